"""Combine by magnitude and direction, DoRA: W' = (m / n) ⊙ (W0 + BA), n = ‖W0 + BA‖ per output row.

Paper: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353, equation 5 and section 4.3
(n is a constant in the backward pass). The paper's columns are output features, rows in torch's layout.
Trainable parameters per site: out, beside those of the factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loraplex.adapters.contracts import BaseWeight, Combine, Factors, SiteInit
from loraplex.adapters.registry import REGISTRY, Axis, Capability, Deployed, Method, Preset


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
        # the name must contain "lora_magnitude_vector": TRL exempts it from its bfloat16 cast by name
        shape = torch.ones(site.out_features)
        if not site.meta:
            shape = _norm(_square(site.weight().detach()))
            if not site.identity:
                shape = shape * (1 + torch.rand(shape.shape, generator=site.generator()).to(shape))
        self.lora_magnitude_vector = nn.Parameter(shape)

    def delta(self, x: Tensor, dropped: Tensor, y0: Tensor, base: BaseWeight, factors: Factors) -> Tensor:
        """Return Δy = (m/n − 1) ⊙ drop(x) W0ᵀ + (m/n) ⊙ (drop(x) Aᵀ) Bᵀ (..., out); the bias is not scaled."""
        a, b = factors.pair()
        weight = base.matrix()
        ratio = self._ratio(weight, a, b, factors.gate)
        if dropped is x:
            bias = base.bias()
            frozen = y0 if bias is None else y0 - bias
        else:
            frozen = F.linear(dropped.to(weight.dtype), weight)
        low_rank = F.linear(F.linear(dropped.to(a.dtype), a), b)
        return (ratio - 1) * frozen.to(ratio.dtype) + ratio * low_rank

    def output(self, x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> Tensor:
        """Return (m/n) ⊙ (x W0ᵀ + (x Aᵀ) Bᵀ) + b (..., out), and with dropout what `delta` describes."""
        y0 = F.linear(x, weight, bias)
        return (y0 + self.delta(x, dropped, y0, _Given(weight, bias), factors)).to(y0.dtype)

    def delta_weight(self, weight: Tensor, factors: Factors) -> Tensor:
        """Return (m/n) ⊙ (W0 + BA) − W0 (out, in)."""
        with torch.no_grad():
            a, b = factors.pair()
            ratio = self._ratio(weight, a, b, factors.gate)[:, None]
            return (ratio - 1) * weight.to(ratio.dtype) + ratio * (b @ a)

    def _ratio(self, weight: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
        # with every rank closed the site is off, its magnitude included
        ratio = self.lora_magnitude_vector / row_norm(weight, a, b)
        return torch.where(gate.any(), ratio, torch.ones_like(ratio))


@dataclass(frozen=True)
class _Given(BaseWeight):
    """A weight at hand."""

    weight: Tensor
    offset: Tensor | None

    def matrix(self) -> Tensor:
        return self.weight

    def bias(self) -> Tensor | None:
        return self.offset


def row_norm(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return n = ‖W0 + BA‖ per row (out,) without forming BA, detached.

    n² = ‖W0‖² + 2·rowsum((W0 Aᵀ) ⊙ B) + rowsum((B (A Aᵀ)) ⊙ B), in float32 at least and with autocast off, because
    bfloat16 products leave a relative error of 2.5e-3; n² is clamped at the smallest normal number.
    """
    device = weight.device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        dtype = torch.promote_types(a.dtype, torch.float32)
        weight, a, b = weight.to(dtype), a.to(dtype), b.to(dtype)
        return _norm(_square(weight) + 2 * ((weight @ a.T) * b).sum(1) + ((b @ (a @ a.T)) * b).sum(1))


def _square(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum(1)


def _norm(square: Tensor) -> Tensor:
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()


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
        deployed=Deployed.DORA,
    )
)
REGISTRY.add(
    Preset("dora", "lora", "magnitude", "(m/n) ⊙ (W0 + s·BA)", "arXiv 2402.09353", "r·(in + out) + out"),
)
