"""LoRA factors: one trainable pair per site.

Paper: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, section 4.1;
the scale alpha/√r is rsLoRA's, Kalajdzievski, arXiv 2312.03732.
ΔW = s·B·diag(gate)·A with s = alpha/r. Trainable parameters per site: r·(in + out).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraplex.adapters.contracts import Factors, SiteInit, uniform
from loraplex.adapters.registry import REGISTRY, Axis, Capability, Deployed, Method, Preset


@dataclass(frozen=True)
class LoRA:
    """Options of the LoRA factors."""

    use_rslora: bool = False
    """Scale by alpha/√r (rsLoRA) instead of alpha/r."""

    def scale(self, alpha: float, rank: int) -> float:
        """Return s: alpha/√r with rsLoRA, alpha/r otherwise."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def largest_rank(self, in_features: int, out_features: int) -> int:
        """Return the largest rank that is allowed: beyond the longer side not even one of A and B is low-rank."""
        return max(in_features, out_features)

    def build(self, site: SiteInit) -> LoRAFactors:
        """Return freshly initialized factors for a site."""
        return LoRAFactors(site, self)


class LoRAFactors(Factors):
    """A ~ U(−1/√in, 1/√in), B = 0 at the start (the paper's initialization as `nn.Linear` draws it)."""

    def __init__(self, site: SiteInit, options: LoRA) -> None:
        super().__init__(site, options.scale(site.alpha, site.rank))
        generator = site.generator()
        bound = 1 / math.sqrt(site.in_features)
        self.lora_A = nn.Parameter(uniform((site.rank, site.in_features), bound, generator))
        b = torch.zeros(site.out_features, site.rank)
        if not site.identity:
            b = uniform((site.out_features, site.rank), 1 / math.sqrt(site.rank), generator)
        self.lora_B = nn.Parameter(b)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return the trainable pair itself."""
        return self.lora_A, self.lora_B


REGISTRY.add(
    Method(
        name="lora",
        axis=Axis.FACTORS,
        options=LoRA,
        summary="one trainable pair per site",
        paper="arXiv 2106.09685",
        parameters="r·(in + out)",
        provides=frozenset(
            {Capability.STATIC, Capability.PAIR, Capability.GATES, Capability.RANK_INPUT},
        ),
        deployed=Deployed.LORA,
    )
)
REGISTRY.add(
    Preset("lora", "lora", "add", "W0 + s·BA", "arXiv 2106.09685", "r·(in + out)"),
)
