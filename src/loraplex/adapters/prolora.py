"""PRoLoRA factors: a few ranks are whole, the others are repeated chunks, each copy rotated along the ranks.

Paper: Wang et al., PRoLoRA: Partial Rotation Empowers More Parameter-Efficient LoRA, arXiv 2402.16902, section 3;
strides and initialization as in the official code (Forence1999/PRoLoRA, chunkwise_sharing_LoRA.py).
With R = r − u shared ranks, chunks A0 (R, ⌈in/m⌉), B0 (⌈out/n⌉, R) and strides s_A = max(⌊R/m⌋, 1), s_B likewise,
    A[k, j·⌈in/m⌉ + i] = A0[(k + j·s_A) mod R, i],    B[j·⌈out/n⌉ + i, k] = B0[i, (k + j·s_B) mod R]    (k < R),
cut to in columns and out rows; the last u ranks of A and B are trained as they are. ΔW = s·B·diag(gate)·A, s = alpha/r.
Trainable parameters per site: u·(in + out) + (r − u)·(⌈in/m⌉ + ⌈out/n⌉). u = r or m = n = 1 is LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraplex.adapters.contracts import Factors, Rate, SiteInit, check_lr_ratio, check_rank, scaling, uniform
from loraplex.adapters.registry import REGISTRY, Axis, Capability, Method, Preset
from loraplex.errors import UserError
from loraplex.option_values import is_whole


@dataclass(frozen=True)
class PRoLoRA:
    """Options of the PRoLoRA factors, under the paper's names."""

    u: int = 1
    """Ranks that are not shared, at most the rank of every site."""
    m: int = 2
    """How often the chunk of A is repeated along the input."""
    n: int = 2
    """How often the chunk of B is repeated along the output."""
    use_rslora: bool = False
    """Scale by alpha/√r (rsLoRA) instead of alpha/r."""
    loraplus_lr_ratio: float = 1.0
    """Learning rate of B (its chunk and its whole ranks) as a multiple of A's, which is the optimizer's (LoRA+)."""
    loraplus_vectors: bool = True
    """Whether whatever has one dimension (trained biases) learns at B's rate, as LoRA+'s code and PEFT have it; false
    leaves vectors at the optimizer's rate."""

    def __post_init__(self) -> None:
        """Refuse numbers that are not whole, or too small."""
        check_lr_ratio(self.loraplus_lr_ratio)
        for name, least in (("u", 0), ("m", 1), ("n", 1)):
            value = getattr(self, name)
            if not is_whole(value) or value < least:
                raise UserError(f"{name} of PRoLoRA is {value!r}: give a whole number of at least {least}")

    def scale(self, alpha: float, rank: int) -> float:
        """Return s: alpha/√r with rsLoRA, alpha/r otherwise."""
        return scaling(alpha, rank, self.use_rslora)

    def largest_rank(self, in_features: int, out_features: int) -> int:
        """Return the largest rank that is allowed, as for LoRA."""
        return max(in_features, out_features)

    def build(self, site: SiteInit) -> PRoLoRAFactors:
        """Return freshly initialized factors for a site."""
        return PRoLoRAFactors(site, self)


class PRoLoRAFactors(Factors):
    """A0 and A_u ~ U(−1/√in, 1/√in), the bound of the full width (the paper's rectified initialization); B = 0."""

    rows_a: Tensor
    rows_b: Tensor

    def __init__(self, site: SiteInit, options: PRoLoRA) -> None:
        super().__init__(site, options.scale(site.alpha, check_rank(site.name, site.rank)))
        if options.u > site.rank:
            raise UserError(
                f"rank of {site.name} is {site.rank}, but u = {options.u} ranks are not shared: raise r or lower u"
            )
        self.lr_ratio, self.lr_vectors = options.loraplus_lr_ratio, options.loraplus_vectors
        shared = site.rank - options.u
        generator = site.generator()
        bound = 1 / math.sqrt(site.in_features)

        def a(rank: int, width: int) -> nn.Parameter | None:
            return nn.Parameter(uniform((rank, width), bound, generator)) if rank else None

        def b(rank: int, width: int) -> nn.Parameter | None:
            if not rank:
                return None
            if site.identity:
                return nn.Parameter(torch.zeros(width, rank))
            return nn.Parameter(uniform((width, rank), 1 / math.sqrt(site.rank), generator))

        self.lora_A = a(shared, math.ceil(site.in_features / options.m))
        self.lora_B = b(shared, math.ceil(site.out_features / options.n))
        self.lora_A_unshared = a(options.u, site.in_features)
        self.lora_B_unshared = b(options.u, site.out_features)
        self.register_buffer("rows_a", _rotation(shared, options.m), persistent=False)
        self.register_buffer("rows_b", _rotation(shared, options.n), persistent=False)

    def raw_pair(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r), the shared ranks first."""
        if self.lora_A is None or self.lora_B is None:
            assert self.lora_A_unshared is not None
            assert self.lora_B_unshared is not None
            return self.lora_A_unshared, self.lora_B_unshared
        a = _expand(self.lora_A, self.rows_a, self.in_features)
        b = _expand(self.lora_B.T, self.rows_b, self.out_features).T
        if self.lora_A_unshared is None or self.lora_B_unshared is None:
            return a, b
        return torch.cat([a, self.lora_A_unshared]), torch.cat([b, self.lora_B_unshared], dim=1)

    def rates(self) -> Iterator[tuple[nn.Parameter, Rate]]:
        """Yield what B is made of with λ = η_B/η_A of LoRA+."""
        if self.lr_ratio != 1:
            yield from ((b, Rate(self.lr_ratio)) for b in (self.lora_B, self.lora_B_unshared) if b is not None)

    def vector_rate(self) -> Rate | None:
        """Return λ for vectors too, unless `loraplus_vectors` is off."""
        return Rate(self.lr_ratio) if self.lr_ratio != 1 and self.lr_vectors else None


def _rotation(shared: int, copies: int) -> Tensor:
    """Return (R·copies,): at k·copies + j the row (k + j·stride) mod R that copy j has in place of row k."""
    stride = max(shared // copies, 1)
    rows = torch.arange(shared)[:, None] + stride * torch.arange(copies)
    return (rows % max(shared, 1)).flatten()


def _expand(chunk: Tensor, rows: Tensor, width: int) -> Tensor:
    """Return (R, width): the copies of `chunk` (R, c) side by side, their rows rotated, cut to `width`."""
    ranks = len(chunk)
    if len(rows) == ranks:
        return chunk
    return chunk.index_select(0, rows).view(ranks, -1)[:, :width]


REGISTRY.add(
    Method(
        name="prolora",
        axis=Axis.FACTORS,
        options=PRoLoRA,
        summary="factors made of rotated, repeated chunks beside a few whole ranks",
        paper="arXiv 2402.16902",
        parameters="u·(in + out) + (r − u)·(⌈in/m⌉ + ⌈out/n⌉)",
        provides=frozenset({Capability.STATIC, Capability.PAIR, Capability.GATES, Capability.RANK_INPUT}),
    )
)
REGISTRY.add(
    Preset(
        "prolora",
        "prolora",
        "add",
        "W0 + s·BA, A and B from rotated chunks",
        "arXiv 2402.16902",
        "u·(in + out) + (r − u)·(⌈in/m⌉ + ⌈out/n⌉)",
    ),
)
