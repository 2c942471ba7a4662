"""Tied-LoRA factors: one pair for all layers, scaled by vectors of each layer.

Paper: Renduchintala et al., Tied-LoRA: Enhancing parameter efficiency of LoRA with weight tying, arXiv 2311.09578,
section 2: ΔW_l = s·diag(v_l)·B·diag(u_l)·diag(gate_l)·A with A (r, in) and B (out, r) of all layers, u_l (r,) and
v_l (out,) of one; s = alpha/r, which the paper keeps at 1. What is tied and what is trained are flags.
A pair is tied per kind of module (its own name: q_proj) and shape. The projections of queries, keys and values of one
attention count as one site, as in the paper: they share A and u, while B and v belong to each.
Trainable parameters of a site that shares with no other: r·in (A) + out·r (B) + r (u) + out (v), those trained.
Under L layers with q, k, v of d outputs each, r·(d + 3d) + L·(r + 3d): the paper's TL6; without u and v its TL5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraplex.adapters.contracts import Factors, SiteInit, scaling, uniform
from loraplex.adapters.registry import REGISTRY, Axis, Capability, Method, Preset
from loraplex.errors import UserError

_ORDER = ("train_B", "train_v", "train_u", "train_A")
"""Which tensor starts at 0: the first that is trained, so that ΔW starts at 0 and has a gradient."""


@dataclass(frozen=True)
class TiedLoRA:
    """Options of the Tied-LoRA factors."""

    tie_A: bool = True
    """One A for all layers."""
    tie_B: bool = True
    """One B for all layers."""
    train_A: bool = True
    """Train A; frozen it is random and kept in the file."""
    train_B: bool = True
    """Train B; frozen it is random and kept in the file, and v starts at 0."""
    train_u: bool = True
    """Train the scales of the ranks; frozen they are 1."""
    train_v: bool = True
    """Train the scales of the outputs; frozen they are 1."""
    fused: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "query", "key", "value")
    """Kinds that count as one site where they stand in one module: they share A and u. Empty: every kind for itself."""

    def __post_init__(self) -> None:
        """Normalize and check."""
        object.__setattr__(self, "fused", tuple(self.fused))
        if not any(getattr(self, flag) for flag in _ORDER):
            raise UserError(f"Tied-LoRA with nothing to train: set one of {', '.join(sorted(_ORDER))}")

    def scale(self, alpha: float, rank: int) -> float:
        """Return s = alpha/r."""
        return scaling(alpha, rank)

    def largest_rank(self, in_features: int, out_features: int) -> int:
        """Return the largest rank that is allowed, as for LoRA."""
        return max(in_features, out_features)

    def build(self, site: SiteInit) -> TiedFactors:
        """Return the factors for a site; the first of its kind makes what it shares with the others."""
        return TiedFactors(site, self)


class TiedFactors(Factors):
    """A ~ U(−1/√in, 1/√in) and B ~ U(−1/√r, 1/√r) where they do not start at 0 (see `_ORDER`), u = v = 1."""

    shared_A: _Shared
    shared_B: _Shared
    shared_u: _Shared

    def __init__(self, site: SiteInit, options: TiedLoRA) -> None:
        super().__init__(site, options.scale(site.alpha, site.rank))
        module, _, kind = site.name.rpartition(".")
        fused = kind in options.fused
        group = "fused" if fused else kind
        zero = next(flag for flag in _ORDER if getattr(options, flag)) if site.identity else ""
        rank, inputs, outputs = site.rank, site.in_features, site.out_features

        def a(name: str) -> _Shared:
            start = _random((rank, inputs), inputs, site, name, zero == "train_A")
            return _Shared("lora_A", start, options.train_A)

        def b(name: str) -> _Shared:
            start = _random((outputs, rank), rank, site, name, zero == "train_B")
            return _Shared("lora_B", start, options.train_B)

        def place(attribute: str, tied: bool, label: str, size: str, make: Callable[[str], _Shared]) -> None:
            """Share the tensor with every site of that label, or with those of this module alone."""
            name = f"{attribute[-1]}/{label}/{size}" if tied else f"{attribute[-1]}/{module}/{label}/{size}"
            key = name.replace(".", "/")
            self.share(attribute, site, key, lambda: make(key))

        place("shared_A", options.tie_A, group, f"{rank}x{inputs}", a)
        place("shared_B", options.tie_B, kind, f"{outputs}x{rank}x{inputs}", b)
        if options.train_u:
            start = torch.zeros(rank) if zero == "train_u" else torch.ones(rank)
            place("shared_u", False, group, f"{rank}x{inputs}", lambda _: _Shared("lora_u", start, True))
        self.lora_v = nn.Parameter(_scales(site, zero == "train_v")) if options.train_v else None
        self.has_u = options.train_u

    def raw_pair(self) -> tuple[Tensor, Tensor]:
        """Return diag(u) A (r, in) and diag(v) B (out, r)."""
        device = self.gate.device
        a, b = self.shared_A.tensor.to(device), self.shared_B.tensor.to(device)
        if self.has_u:
            a = a * self.shared_u.tensor.to(device)[:, None]
        if self.lora_v is not None:
            b = b * self.lora_v[:, None]
        return a, b


class _Shared(nn.Module):
    """One tensor, trained or frozen; sites refer to this module, because casting and sharding replace tensors."""

    def __init__(self, name: str, value: Tensor, trained: bool) -> None:
        super().__init__()
        self.name = name
        if trained:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now."""
        value = getattr(self, self.name)
        assert isinstance(value, Tensor)
        return value


def _random(shape: tuple[int, int], fan_in: int, site: SiteInit, name: str, zero: bool) -> Tensor:
    """Return the start of a shared tensor; it depends on the seed and its own name, not on the site that makes it."""
    return torch.zeros(shape) if zero else uniform(shape, 1 / math.sqrt(fan_in), site.generator(name))


def _scales(site: SiteInit, zero: bool) -> Tensor:
    """Return the start of v (out,)."""
    if zero:
        return torch.zeros(site.out_features)
    ones = torch.ones(site.out_features)
    return ones if site.identity else ones + torch.rand(ones.shape, generator=site.generator())


_PARAMETERS = "train_A·r·in + train_B·r·out + train_u·r + train_v·out"
_PAPER = "arXiv 2311.09578"

REGISTRY.add(
    Method(
        name="tied",
        axis=Axis.FACTORS,
        options=TiedLoRA,
        summary="one pair for all layers, scaled by vectors of each",
        paper=_PAPER,
        parameters=_PARAMETERS,
        provides=frozenset(
            {Capability.STATIC, Capability.PAIR, Capability.GATES, Capability.RANK_INPUT, Capability.SHARED},
        ),
        only_peft_model="the tensors that its sites share are kept by PEFT's tuner",
    )
)
REGISTRY.add(
    Preset(
        "tied-tl6",
        "tied",
        "add",
        "W0 + s·diag(v)·B·diag(u)·A, A and B of all layers",
        _PAPER,
        "r·(in + out) per kind, r + out per site",
    ),
)
REGISTRY.add(
    Preset(
        "tied-tl5",
        "tied",
        "add",
        "W0 + s·BA, A and B of all layers",
        _PAPER,
        "r·(in + out) per kind",
        options={"train_u": False, "train_v": False},
    ),
)
