"""LoRA factors: one trainable pair per site.

Paper: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, section 4.1;
the scale alpha/√r is rsLoRA's, Kalajdzievski, arXiv 2312.03732; the start from singular vectors is PiSSA's, Meng et
al., arXiv 2404.02948; the two learning rates η_B = λ·η_A are LoRA+'s, Hayou et al., arXiv 2402.12354.
ΔW = s·B·diag(gate)·A with s = alpha/r. Trainable parameters per site: r·(in + out).
Under PiSSA W0 ≈ U S Vᵀ, B0 = U √(S/s), A0 = √(S/s) Vᵀ, and ΔW = s·(B A − B0 A0): the paper puts W0 − s·B0 A0 in the
place of W0, here W0 stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from loraplex.adapters.bases import singular_bases
from loraplex.adapters.contracts import Factors, Rate, SiteInit, check_lr_ratio, check_rank, scaling, uniform
from loraplex.adapters.registry import REGISTRY, Axis, Capability, Method, Preset, SaveFormat
from loraplex.errors import UserError, nearest


@dataclass(frozen=True)
class LoRA:
    """Options of the LoRA factors."""

    use_rslora: bool = False
    """Scale by alpha/√r (rsLoRA) instead of alpha/r."""
    loraplus_lr_ratio: float = 1.0
    """Learning rate of B as a multiple of A's, which is the optimizer's (LoRA+)."""
    loraplus_vectors: bool = True
    """Whether whatever has one dimension (DoRA's magnitude, trained biases) learns at B's rate, as in LoRA+'s code and
    PEFT; false leaves vectors at the optimizer's rate."""
    init: Literal["uniform", "pissa"] = "uniform"
    """Start from random A and B = 0, or from the leading singular vectors of W0 ("pissa")."""

    def __post_init__(self) -> None:
        """Refuse an initialization that is not known, and a ratio that is none."""
        check_lr_ratio(self.loraplus_lr_ratio)
        if self.init not in ("uniform", "pissa"):
            hint = nearest(str(self.init), ["uniform", "pissa"])
            raise UserError(f"init is {self.init!r}: choose 'uniform' or 'pissa'.{hint}")

    @property
    def save_format(self) -> SaveFormat:
        """The form of the file: PiSSA's initial pair must come along, as plain LoRA it would double the rank."""
        return SaveFormat.OWN if self.init == "pissa" else SaveFormat.LORA

    def scale(self, alpha: float, rank: int) -> float:
        """Return s: alpha/√r with rsLoRA, alpha/r otherwise."""
        return scaling(alpha, rank, self.use_rslora)

    def largest_rank(self, in_features: int, out_features: int) -> int:
        """Return the largest rank that is allowed: beyond the longer side not even one of A and B is low-rank.

        W0 has as many singular vectors as its shorter side.
        """
        return (min if self.init == "pissa" else max)(in_features, out_features)

    def build(self, site: SiteInit) -> Factors:
        """Return freshly initialized factors for a site."""
        return PiSSAFactors(site, self) if self.init == "pissa" else LoRAFactors(site, self)


class LoRAFactors(Factors):
    """A ~ U(−1/√in, 1/√in), B = 0 at the start (the paper's initialization as `nn.Linear` draws it)."""

    def __init__(self, site: SiteInit, options: LoRA) -> None:
        super().__init__(site, options.scale(site.alpha, site.rank))
        self.lr_ratio, self.lr_vectors = options.loraplus_lr_ratio, options.loraplus_vectors
        generator = site.generator()
        bound = 1 / math.sqrt(site.in_features)
        self.lora_A = nn.Parameter(uniform((site.rank, site.in_features), bound, generator))
        b = torch.zeros(site.out_features, site.rank)
        if not site.identity:
            b = uniform((site.out_features, site.rank), 1 / math.sqrt(site.rank), generator)
        self.lora_B = nn.Parameter(b)

    def raw_pair(self) -> tuple[Tensor, Tensor]:
        """Return the trainable pair itself."""
        return self.lora_A, self.lora_B

    def rates(self) -> Iterator[tuple[nn.Parameter, Rate]]:
        """Yield B with λ = η_B/η_A of LoRA+."""
        if self.lr_ratio != 1:
            yield self.lora_B, Rate(self.lr_ratio)

    def vector_rate(self) -> Rate | None:
        """Return λ for vectors too, unless `loraplus_vectors` is off."""
        return Rate(self.lr_ratio) if self.lr_ratio != 1 and self.lr_vectors else None

    def rank_parameters(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Yield A by rows and B by columns."""
        yield from ((self.lora_A, 0), (self.lora_B, 1))


class PiSSAFactors(Factors):
    """A and B start at A0 and B0, which stay as buffers and are saved: exactly LoRA of rank 2r."""

    repeats = 2
    initial_A: Tensor
    initial_B: Tensor

    def __init__(self, site: SiteInit, options: LoRA) -> None:
        super().__init__(site, options.scale(site.alpha, site.rank))
        self.lr_ratio, self.lr_vectors = options.loraplus_lr_ratio, options.loraplus_vectors
        check_rank(site.name, site.rank, options.largest_rank(site.in_features, site.out_features))
        weight = site.weight().detach()
        if site.meta or weight.is_meta:
            a = torch.empty(site.rank, site.in_features, device=weight.device)
            b = torch.empty(site.out_features, site.rank, device=weight.device)
        else:
            bases = singular_bases(weight, site.rank)
            root = (bases.s / self.scale).sqrt()
            a, b = root[:, None] * bases.vh, bases.u * root
        self.register_buffer("initial_A", a)
        self.register_buffer("initial_B", b)
        self.lora_A = nn.Parameter(a.clone())
        self.lora_B = nn.Parameter(b.clone())
        if not site.identity:
            bound = 1 / math.sqrt(site.rank)
            self.lora_B.data += uniform((site.out_features, site.rank), bound, site.generator()).to(b)

    def raw_pair(self) -> tuple[Tensor, Tensor]:
        """Return [A − A0; A0] (2r, in) and [B, B − B0] (out, 2r): B A − B0 A0, and exactly 0 at the start."""
        a0, b0 = self.initial_A.to(self.lora_A.dtype), self.initial_B.to(self.lora_B.dtype)
        return torch.cat([self.lora_A - a0, a0]), torch.cat([self.lora_B, self.lora_B - b0], dim=1)

    def at_start(self) -> Tensor:
        """Return which ranks (r,) still are A0 and B0, so that they add nothing."""
        a, b = self.lora_A == self.initial_A.to(self.lora_A), self.lora_B == self.initial_B.to(self.lora_B)
        return a.all(1) & b.all(0)

    def rank_space(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and s·B·diag(gate) (out, r) as they are trained, without what is taken off."""
        return self.lora_A, self.lora_B * self.rank_scale(self.lora_B.dtype)[: self.rank]

    def rates(self) -> Iterator[tuple[nn.Parameter, Rate]]:
        """Yield B with λ = η_B/η_A of LoRA+."""
        if self.lr_ratio != 1:
            yield self.lora_B, Rate(self.lr_ratio)

    def vector_rate(self) -> Rate | None:
        """Return λ for vectors too, unless `loraplus_vectors` is off."""
        return Rate(self.lr_ratio) if self.lr_ratio != 1 and self.lr_vectors else None

    def rank_parameters(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Yield A by rows and B by columns."""
        yield from ((self.lora_A, 0), (self.lora_B, 1))


REGISTRY.add(
    Method(
        name="lora",
        axis=Axis.FACTORS,
        options=LoRA,
        summary="one trainable pair per site",
        paper="arXiv 2106.09685",
        parameters="r·(in + out)",
        provides=frozenset(
            {Capability.STATIC, Capability.PAIR, Capability.GATES, Capability.RANK_INPUT, Capability.SHRINKS},
        ),
        save_format=SaveFormat.LORA,
        default=True,
    )
)
REGISTRY.add(
    Preset("lora", "lora", "add", "W0 + s·BA", "arXiv 2106.09685", "r·(in + out)", default=True),
)
