"""Site: a named place in a model where an adapter may sit."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SEVERAL = frozenset({"dense", "c_proj"})
"""Names that several modules of one block have, in BERT and its like and in GPT-2."""


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
        """The module's own name, the same in every layer (q_proj, c_attn, query).

        Where a block has several of that name, its whole path in the block (attention.output.dense).
        """
        own = self.name.rsplit(".", 1)[-1]
        return re.split(r"(?:^|\.)\d+\.", self.name, maxsplit=1)[-1] if own in _SEVERAL else own

    @property
    def layer(self) -> int | None:
        """Index of the block that holds the site: the first number in its name, None outside the blocks."""
        match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.name)
        return int(match[1]) if match else None
