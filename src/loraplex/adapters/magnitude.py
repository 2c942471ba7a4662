"""Combine by magnitude and direction, DoRA: W' = (m / n) ⊙ (W0 + BA), n = ‖W0 + BA‖ per output row.

Paper: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353, equation 5 and section 4.3
(n is a constant in the backward pass). The paper's columns are output features, rows in torch's layout.
Trainable parameters per site: out, beside those of the factors.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loraplex.adapters.contracts import BaseWeight, Combine, Factors, GivenWeight, SiteInit
from loraplex.adapters.registry import REGISTRY, Adapter, Axis, Capability, Method, Preset, SaveFormat
from loraplex.compat.torch import version_of
from loraplex.kernels.magnitude import magnitude_linear, positive_root, row_norm, squared_row_norm


@dataclass(frozen=True)
class Magnitude:
    """Options of combine by magnitude: there are none."""

    def build(self, site: SiteInit) -> MagnitudeDirection:
        """Return the combine for a site."""
        return MagnitudeDirection(site)


class MagnitudeDirection(Combine):
    """m starts at ‖W0‖ per output row, so that the first output is the frozen one."""

    def __init__(self, site: SiteInit) -> None:
        super().__init__()
        self._square = _SquareCache()
        # the name must contain "lora_magnitude_vector": TRL exempts it from its bfloat16 cast by name
        start = torch.ones(site.out_features)
        if not site.meta:
            # the root that `row_norm` takes, so that m / n is exactly 1 at the start
            start = positive_root(squared_row_norm(site.weight().detach()))
            if not site.identity:
                start = start * (1 + torch.rand(start.shape, generator=site.generator()).to(start))
        self.lora_magnitude_vector = nn.Parameter(start)

    def output(self, x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> Tensor:
        """Return (m/n) ⊙ (x W0ᵀ + (x Aᵀ) Bᵀ) + b (..., out); with dropout the sum that `delta` describes."""
        if factors.closed:
            return F.linear(x, weight, bias)
        if dropped is not x or torch.compiler.is_compiling():
            y0 = F.linear(x, weight, bias)
            return (y0 + self.delta(x, dropped, y0, GivenWeight(weight, bias), factors)).to(y0.dtype)
        a, b = factors.raw_pair()
        s, square = factors.leading_scale(b.dtype), self._square.of(weight)
        return magnitude_linear(x, weight, bias, a, b, s, self.lora_magnitude_vector, square)

    def delta(self, x: Tensor, dropped: Tensor, y0: Tensor, base: BaseWeight, factors: Factors) -> Tensor:
        """Return Δy = (m/n − 1) ⊙ drop(x) W0ᵀ + (m/n) ⊙ (drop(x) Aᵀ) Bᵀ (..., out); the bias is not scaled."""
        a, b = factors.pair()
        weight = base.matrix()
        m, n = self._magnitude_and_norm(weight, factors)
        ratio = m / n
        if dropped is x:
            bias = base.bias()
            frozen = y0 if bias is None else y0 - bias
        else:
            frozen = F.linear(dropped.to(weight.dtype), weight)
        low_rank = F.linear(F.linear(dropped.to(a.dtype), a), b)
        return (ratio - 1) * frozen.to(ratio.dtype) + ratio * low_rank

    def project_up(self, low: Tensor, base: BaseWeight, factors: Factors) -> Tensor:
        """Return (m/n) ⊙ low Bᵀ (n, out), n the norm of the weight as it is deployed: without `low`."""
        _, b = factors.rank_space()
        m, n = self._magnitude_and_norm(base.matrix(), factors)
        return (m / n) * F.linear(low.to(b.dtype), b)

    def delta_weight(self, weight: Tensor, factors: Factors) -> Tensor:
        """Return (m/n) ⊙ (W0 + BA) − W0 (out, in)."""
        with torch.no_grad():
            a, b = factors.pair()
            m, n = self._magnitude_and_norm(weight, factors)
            ratio = (m / n)[:, None]
            return (ratio - 1) * weight.to(ratio.dtype) + ratio * (b @ a)

    def _magnitude_and_norm(self, weight: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
        """Return m and n (out,); both ones when every rank is closed: the site is off, its magnitude included."""
        a, b = factors.pair()
        m, n = self.lora_magnitude_vector, row_norm(weight, a, b, self._square.of(weight))
        off = ~factors.gate.any()
        return m.masked_fill(off, 1), n.masked_fill(off, 1)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._square.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class _SquareCache:
    """‖W0‖² per row, kept as long as W0 is the same tensor with the same content.

    Merging and unmerging move the weight to other memory, loading raises its version, a change of dtype or device
    passes through `_apply`.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.owner: weakref.ref[Tensor] | None = None
        self.state: tuple[int, int] = (0, 0)
        self.square = torch.empty(0)

    def of(self, weight: Tensor) -> Tensor:
        """Return ‖W0‖² (out,) of W0 (out, in), or of a transposed view of it."""
        if torch.compiler.is_compiling():
            return squared_row_norm(weight.detach())
        owner = weight if weight._base is None else weight._base
        state = (weight.data_ptr(), version_of(weight))
        if self.owner is None or self.owner() is not owner or self.state != state:
            self.square = squared_row_norm(weight.detach())
            self.owner, self.state = weakref.ref(owner), state
        return self.square

    def __deepcopy__(self, memo: dict[int, Any]) -> _SquareCache:
        return _SquareCache()

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return (_SquareCache, ())


def DoRA(factors: Any = None) -> Adapter:  # noqa: N802  (the method's name)
    """Return DoRA: W' = (m / n) ⊙ (W0 + BA) with a trained magnitude m (out,) and n = ‖W0 + BA‖ per output row.

    `factors` are the options of what BA is made of, those of LoRA when absent: `DoRA(LoRA(use_rslora=True))`,
    `DoRA(TiedLoRA())`. Paper: Liu et al., arXiv 2402.09353.

    Raises:
        UserError: for factors that are not one pair (A, B) per site.
    """
    return Adapter(REGISTRY.default(Axis.FACTORS).options() if factors is None else factors, Magnitude())


REGISTRY.add(
    Method(
        name="magnitude",
        axis=Axis.COMBINE,
        options=Magnitude,
        summary="learns a magnitude per output feature beside the direction",
        paper="arXiv 2402.09353",
        parameters="out",
        needs=frozenset({Capability.STATIC, Capability.PAIR}),
        provides=frozenset({Capability.GATES}),
        save_format=SaveFormat.DORA,
    )
)
REGISTRY.add(
    Preset("dora", "lora", "magnitude", "(m/n) ⊙ (W0 + s·BA)", "arXiv 2402.09353", "r·(in + out) + out"),
)
