"""Site: a named place in a model where an adapter may sit."""

from __future__ import annotations

import re
from dataclasses import dataclass

EDGES = ("residual_attention", "residual_mlp", "shortcut_block", "shortcut_mlp")
"""Kinds of residual edges, see `allocation.shortcuts`; the last part of their sites' names."""
FROM_BEFORE = "shortcut_mlp"
"""The kind of edge that comes from the block before."""
_SEVERAL = frozenset({"dense", "c_proj"})
"""Names that several modules of one block have, in BERT and its like and in GPT-2."""


def is_edge(name: str) -> bool:
    """Whether a site's name is that of a residual edge, where the base model has no weight."""
    return name.rpartition(".")[2] in EDGES


def kind_of(name: str) -> str:
    """Return the kind of the site of that name, see `Site.kind`."""
    own = name.rsplit(".", 1)[-1]
    return re.split(r"(?:^|\.)\d+\.", name, maxsplit=1)[-1] if own in _SEVERAL else own


@dataclass(frozen=True)
class Site:
    """One linear map of the base model, or an edge between two points of its residual stream."""

    name: str
    """Full module name in the base model; of an edge that of its block and the kind of edge."""
    in_features: int
    out_features: int
    bias: bool

    @property
    def kind(self) -> str:
        """The module's own name, the same in every layer (q_proj, c_attn, query).

        Where a block has several of that name, its whole path in the block (attention.output.dense).
        """
        return kind_of(self.name)

    @property
    def edge(self) -> bool:
        """Whether it is a residual edge."""
        return is_edge(self.name)

    @property
    def layer(self) -> int | None:
        """Index of the block that holds the site: the first number in its name, None outside the blocks."""
        match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.name)
        return int(match[1]) if match else None
