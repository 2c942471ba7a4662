"""HeteroLoRA's shortcuts as options of an allocation: low-rank maps between points of the residual stream.

Paper: Zhang et al., Unlocking the Global Synergies in Low-Rank Adapters, arXiv 2406.14956, section 3.3; kinds, start
and sizes as in the official code (ZixiBenZhang/lora_global_synergies). In block l, with input h_l, let f_l be the input
of its MLP branch. Every shortcut is x ↦ s·P_B P_A x with P_A (r, d) ~ U(−1/√d, 1/√d), P_B (d, r) = 0, s = alpha/r:

    residual_attention  (residual_1)    from h_l      to the sum after attention
    residual_mlp        (residual_2)    from f_l      to the sum after the MLP
    shortcut_block      (shortcut_sa)   from h_l      to the sum after the MLP
    shortcut_mlp        (shortcut_ffn)  from f_{l−1}  to the sum after attention; not in block 0

Where norms stand before the branches (Llama, Qwen, GPT-2, most OPT) the sums are the residual stream itself:
    f_l = h_l + Attn(N1 h_l) + residual_attention(h_l) + shortcut_mlp(f_{l−1})
    h_{l+1} = f_l + MLP(N2 f_l) + residual_mlp(f_l) + shortcut_block(h_l)
Where norms stand on the sums (BERT, OPT-350M) a shortcut adds to the sum under its norm:
    f_l = N1(h_l + Attn(h_l) + residual_attention(h_l) + shortcut_mlp(f_{l−1}))
    h_{l+1} = N2(f_l + MLP(f_l) + residual_mlp(f_l) + shortcut_block(h_l))
The official code puts a norm of the block once more on every sum with a shortcut, so that it does not start at the
pre-trained model; here there is no further norm, and it does. Trainable parameters per shortcut: 2·r·d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loraplex.adapters.contracts import SiteAdapter, SiteInit, check_rank
from loraplex.adapters.registry import REGISTRY, parse_adapter
from loraplex.allocation.contracts import Allocator
from loraplex.allocation.edges import Edges
from loraplex.allocation.sites import EDGES
from loraplex.errors import UserError, nearest
from loraplex.option_values import is_number


@dataclass(frozen=True)
class ShortcutOptions(Allocator):
    """Options of an allocation that may spend on shortcuts."""

    shortcuts: bool | str | Sequence[str] = field(default=False, kw_only=True)
    """Low-rank maps along the residual stream as further candidates: true for all four kinds, or the kinds or the full
    names of those wanted (residual_attention, residual_mlp, shortcut_block, shortcut_mlp)."""
    shortcut_r: int = field(default=8, kw_only=True)
    """Rank of a shortcut that `rank_pattern` does not name."""
    shortcut_alpha: float = field(default=4.0, kw_only=True)
    """Scale numerator of a shortcut: s = shortcut_alpha/r."""

    def __post_init__(self) -> None:
        """Refuse names that are no edge, and values out of range; a list becomes a tuple."""
        if not isinstance(self.shortcuts, bool):
            given: Any = self.shortcuts
            chosen = tuple(given) if isinstance(given, (list, tuple, set, frozenset)) else (given,)
            for name in chosen:
                if not isinstance(name, str) or name.rpartition(".")[2] not in EDGES:
                    hint = nearest(str(name), EDGES)
                    raise UserError(f"shortcuts names {name!r}: choose true, or some of {', '.join(EDGES)}.{hint}")
            object.__setattr__(self, "shortcuts", chosen)
        check_rank("the shortcuts (shortcut_r)", self.shortcut_r)
        alpha: Any = self.shortcut_alpha
        if not is_number(alpha) or not 0 < alpha < math.inf:
            raise UserError(f"shortcut_alpha is {alpha!r}: give a number above 0")

    @property
    def edges(self) -> Edges | None:
        """The edges that are asked for."""
        if not self.shortcuts:
            return None
        chosen = EDGES if isinstance(self.shortcuts, bool) else tuple(self.shortcuts)
        return Edges(chosen, self.shortcut_r, float(self.shortcut_alpha))


def build_shortcut(site: SiteInit) -> SiteAdapter:
    """Return s·P_B P_A for an edge, freshly initialized: a pair of LoRA, without dropout, whatever the adapter is."""
    pair = parse_adapter(REGISTRY.default_preset)
    return SiteAdapter(pair.factors.build(site), pair.combine.build(site), dropout=0.0)
