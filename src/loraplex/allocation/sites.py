"""Site: a named place in a model where an adapter may sit."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One linear map of the base model."""

    name: str
    """Full module name in the base model."""
    in_features: int
    out_features: int
    bias: bool

    @property
    def kind(self) -> str:
        """The module's own name, the same in every layer (q_proj, c_attn, query)."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def layer(self) -> int | None:
        """Index of the block that holds the site: the first number in its name, None outside the blocks."""
        match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.name)
        return int(match[1]) if match else None
