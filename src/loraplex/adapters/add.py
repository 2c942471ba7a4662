"""Combine by addition: y = x W0ᵀ + b + (drop(x) Aᵀ) Bᵀ.

Paper: Hu et al., arXiv 2106.09685, equation 3. No trainable parameters of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from loraplex.adapters.contracts import BaseWeight, Combine, Factors, SiteInit
from loraplex.adapters.registry import REGISTRY, Axis, Capability, Method, SaveFormat
from loraplex.kernels.low_rank import low_rank_linear


@dataclass(frozen=True)
class Add:
    """Options of combine by addition: there are none."""

    def build(self, site: SiteInit) -> Addition:
        """Return the combine for a site."""
        return Addition()


class Addition(Combine):
    """Δy = (drop(x) Aᵀ) Bᵀ."""

    def delta(self, x: Tensor, dropped: Tensor, y0: Tensor, base: BaseWeight, factors: Factors) -> Tensor:
        """Return Δy (..., out) in the dtype of the factors."""
        a, b = factors.pair()
        return F.linear(F.linear(dropped.to(a.dtype), a), b)

    def output(self, x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> Tensor:
        """Return x W0ᵀ + b + Δy (..., out) in the dtype of the frozen linear."""
        a, b = factors.raw_pair()
        return low_rank_linear(x, None if dropped is x else dropped, weight, bias, a, b, factors.leading_scale(b.dtype))

    def project_up(self, low: Tensor, base: BaseWeight, factors: Factors) -> Tensor:
        """Return low Bᵀ (n, out)."""
        _, b = factors.rank_space()
        return F.linear(low.to(b.dtype), b)

    def delta_weight(self, weight: Tensor, factors: Factors) -> Tensor:
        """Return BA (out, in)."""
        a, b = (tensor.detach() for tensor in factors.pair())
        return b @ a


REGISTRY.add(
    Method(
        name="add",
        axis=Axis.COMBINE,
        options=Add,
        summary="adds the low-rank product to the frozen output",
        paper="arXiv 2106.09685",
        parameters="0",
        needs=frozenset({Capability.STATIC, Capability.PAIR}),
        provides=frozenset({Capability.GATES}),
        save_format=SaveFormat.LORA,
        default=True,
    )
)
