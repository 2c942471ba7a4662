"""What an adapter is made of: Factors form the pair (A, B), Combine lets it meet the frozen weight.

Plain torch; nothing here knows PEFT. Notation: frozen weight W0 (out, in), bias b (out,), input x (..., in),
A (r, in), B (out, r). The scale s is part of B wherever a pair is handed over, once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from loraplex.adapters.gates import GateRecord
from loraplex.compat.torch import version_of
from loraplex.errors import UserError
from loraplex.kernels.loss_scale import LossScale
from loraplex.option_values import is_number, is_whole
from loraplex.seeds import seeded

_MULTIPLE = 16
"""Of how many ranks are computed, for the sake of matrix kernels."""


@dataclass(frozen=True)
class Resolved:
    """Options of a method after the training rows have decided what was left to them."""

    options: Any
    """Of the same class, with nothing left to decide."""
    summary: str
    """What was decided and why, in a line for the user."""
    evidence: Mapping[str, Any]
    """The same as plain values, to be kept with the run."""


@runtime_checkable
class ResolvesFromData(Protocol):
    """Options of a method with a value that the training rows may decide, such as a number that may be 'auto'.

    `build` never sees such a value: whoever has no rows to decide it by is told so by a `UserError` there.
    """

    def resolve_from_data(self, texts: Callable[[], Sequence[str]], seed: int) -> Resolved | None:
        """Return the options with every open value decided, or None where none is open.

        `texts` gives what is asked in every training row, in their order; it reads them when it is called. The same
        texts and seed give the same options.
        """


@dataclass(frozen=True)
class SiteInit:
    """All that a method may look at when it makes its tensors for one site."""

    name: str
    """Full module name in the base model; the initialization depends on it and on the seed, on nothing else."""
    in_features: int
    out_features: int
    rank: int
    alpha: float
    seed: int
    weight: Callable[[], Tensor]
    """Gives W0 as (out, in), dequantized; called only by methods that read it."""
    identity: bool = True
    """False asks for an initialization that changes the output visibly, for tests."""
    heads: int = 1
    """How many B the factors hold side by side; known to the combine, which is built after them."""
    meta: bool = False
    """True when the tensors are about to be overwritten by a checkpoint: expensive initializations are skipped."""
    shared: Callable[[str, Callable[[], nn.Module]], nn.Module] | None = None
    """Gives the adapter's one module of a key, made on first use; None where the site is on its own."""

    def generator(self, name: str | None = None) -> torch.Generator:
        """Return a CPU generator seeded by (seed, `name` or the site's): sites do not depend on each other."""
        return seeded(self.seed, self.name if name is None else name)


@dataclass(frozen=True)
class Rate:
    """How a parameter learns, where it is not at the optimizer's rate."""

    ratio: float = 1.0
    """Of its learning rate to the optimizer's."""
    peak: float | None = None
    """The rate at the peak of the optimizer's schedule, instead of a ratio."""
    decays: bool = True
    """False: no weight decay, whatever the optimizer's is."""


class Factors(nn.Module, ABC):
    """How the pair (A, B) of one site is formed.

    Everything else, forward, merge, export, parameter count, is derived from `raw_pair`.
    A rank gate of ones and zeros lets an allocator close ranks without touching shapes or optimizer state.
    """

    gate: Tensor
    repeats = 1
    """How many times `raw_pair` goes through the ranks that the gate counts."""
    heads = 1
    """How many B stand side by side in `raw_pair`, all of them over one A; a pair has one."""

    def __init__(self, site: SiteInit, scale: float) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = site.in_features, site.out_features, site.rank
        self.scale = scale
        self.register_buffer("gate", torch.ones(site.rank))
        self._kept: _OfGate | None = None
        self._borrowed: list[str] = []

    @abstractmethod
    def raw_pair(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, heads·r), differentiable, neither scaled nor gated.

        With several heads column i·r + k of B is rank k of head i.
        """

    def share(self, attribute: str, site: SiteInit, key: str, make: Callable[[], nn.Module]) -> None:
        """Let `attribute` be the module that all sites of this adapter with this `key` use.

        It has one registered owner: the tuner, or these factors where the site is on its own.
        """
        if site.shared is None:
            setattr(self, attribute, make())
        else:
            # past nn.Module, which would register it here too
            self.__dict__[attribute] = site.shared(key, make)
            self._borrowed.append(attribute)

    def borrowed(self) -> list[nn.Module]:
        """Return the modules that these factors use and the tuner owns."""
        return [self.__dict__[attribute] for attribute in self._borrowed]

    def rank_parameters(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Yield the trained tensors that have an entry per rank, with the dimension along which the ranks lie."""
        yield from ()

    def rates(self) -> Iterator[tuple[nn.Parameter, Rate]]:
        """Yield the parameters that learn at another rate than the optimizer's (LoRA+)."""
        yield from ()

    def vector_rate(self) -> Rate | None:
        """Return how vectors beside the factors learn (a magnitude, biases); None for as the optimizer says."""
        return None

    def check_file(self, site: str, tensors: Mapping[str, Tensor]) -> None:
        """Check that a file's `tensors`, by their names here, go with the frozen tensors that it does not hold.

        Raises:
            UserError: when they do not; it names the `site`.
        """

    def rank_scale(self, dtype: torch.dtype) -> Tensor:
        """Return s·gate (heads·r,): what every column of B is multiplied with."""
        if torch.compiler.is_compiling():
            return self._scaled(dtype)
        scales = self._of_gate().scales
        if dtype not in scales:
            # kept for later calls, which may be of training after one of inference
            with torch.inference_mode(False):
                scales[dtype] = self._scaled(dtype)
        return scales[dtype]

    def leading_scale(self, dtype: torch.dtype) -> Tensor:
        """Return the first k entries of `rank_scale`, behind which all are 0: what lies there need not be computed.

        k is r or a multiple of 16, because products of matrices are slow at odd sizes.
        """
        scale = self.rank_scale(dtype)
        leading = None if torch.compiler.is_compiling() else self._of_gate().leading
        return scale if leading is None else scale[:leading]

    def _scaled(self, dtype: torch.dtype) -> Tensor:
        return self._every(self.gate).to(dtype) * self.scale

    @property
    def closed(self) -> bool:
        """Whether no rank is open: the site is off."""
        return not torch.compiler.is_compiling() and self._of_gate().closed

    def _of_gate(self) -> _OfGate:
        gate, kept = self.gate, self._kept
        if kept is None or kept.gate is not gate or kept.version != version_of(gate):
            opened = gate.nonzero().flatten().tolist()
            # of several heads side by side the columns of B are not those of the gate
            leading = _rounded_up(opened[-1] + 1) if opened and self.repeats * self.heads == 1 else len(gate)
            fewer = leading if leading < len(gate) else None
            self._kept = kept = _OfGate(gate, version_of(gate), closed=not opened, leading=fewer)
        return kept

    def _every(self, gate: Tensor) -> Tensor:
        """Return the gate of every column of B in `raw_pair`."""
        times = self.repeats * self.heads
        return gate if times == 1 else gate.repeat(times)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, heads·r), differentiable, scale and gate included in B exactly once."""
        a, b = self.raw_pair()
        return a, b * self.rank_scale(b.dtype)

    def rank_space(self) -> tuple[Tensor, Tensor]:
        """Return the trained A (r, in) and B (out, r), scale and gate in B: where the rank space takes more input."""
        return self.pair()

    def compact(self) -> tuple[Tensor, Tensor]:
        """Return the pair without its closed ranks: A (r', in), B (out, heads·r'), detached.

        BA, with several heads every B_i A, is unchanged, exactly.
        """
        a, b = (tensor.detach() for tensor in self.pair())
        every = self._every(self.gate).bool()
        return a[every[: len(a)]].clone(), b[:, every].clone()

    def at_start(self) -> Tensor:
        """Return which ranks (r,) change nothing when they open: those whose column of B is 0 as at the start."""
        _, b = self.raw_pair()
        return ~b.detach().any(0)

    @property
    def open_ranks(self) -> int:
        """Number of ranks whose gate is open."""
        return int(self.gate.sum())


def _rounded_up(ranks: int) -> int:
    return -(-ranks // _MULTIPLE) * _MULTIPLE


@dataclass(frozen=True)
class _OfGate:
    """What follows from a gate, kept until the gate is changed or replaced."""

    gate: Tensor
    version: int
    closed: bool
    leading: int | None
    """How many ranks are worth computing, from the first on; None is all."""
    scales: dict[torch.dtype, Tensor] = field(default_factory=dict)


class Combine(nn.Module, ABC):
    """How the pair meets the frozen weight."""

    gates: GateRecord | None = None
    """What a combine that weighs several heads records of its gates; None where there is nothing to weigh."""
    adds_loss = False
    """Whether it adds a loss of its own to the one that is trained."""
    loss_scale: LossScale | None = None
    """By what a loss of its own is scaled, given by the tuner; by 1 where the site is on its own."""

    def drop(self, x: Tensor, dropout: nn.Module) -> Tensor:
        """Return what `delta` and `output` get as `dropped`: x (..., in) after dropout, or x itself where it is off."""
        dropped: Tensor = dropout(x)
        return dropped

    def collapsed(self, factors: Factors, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r), detached and scaled, of the pair that fixed `gates` (heads,) leave.

        Raises:
            UserError: when this combine has no gates.
        """
        raise UserError("this adapter has no gates over heads that could be fixed")

    @abstractmethod
    def delta(self, x: Tensor, dropped: Tensor, y0: Tensor, base: BaseWeight, factors: Factors) -> Tensor:
        """Return what the adapter adds to the frozen output.

        x (..., in) is the input, `dropped` the same after dropout (the same object where there is none),
        y0 (..., out) = x W0ᵀ + b the frozen output. The result has the shape of y0.
        """

    @abstractmethod
    def output(self, x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> Tensor:
        """Return y (..., out): the frozen linear W0 (out, in), b (out,) with this adapter alone, in one fast pass."""

    def project_up(self, low: Tensor, base: BaseWeight, factors: Factors) -> Tensor:
        """Return what `low` (n, r), added to the rank space drop(x) Aᵀ, adds to the output, (n, out).

        Raises:
            UserError: when the rank space takes no additional input.
        """
        raise UserError("this adapter has no rank space that takes additional input")

    @abstractmethod
    def delta_weight(self, weight: Tensor, factors: Factors) -> Tensor:
        """Return W' − W0 (out, in) in the dtype of the adapter, detached; `weight` is W0 (out, in)."""


class BaseWeight(ABC):
    """The frozen weight of a site as Combine sees it, whatever module holds it."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return W0 as (out, in), dequantized where necessary."""

    @abstractmethod
    def bias(self) -> Tensor | None:
        """Return b (out,) or None."""


@dataclass(frozen=True)
class GivenWeight(BaseWeight):
    """A weight at hand."""

    weight: Tensor
    offset: Tensor | None

    def matrix(self) -> Tensor:
        """Return W0 (out, in)."""
        return self.weight

    def bias(self) -> Tensor | None:
        """Return b (out,) or None."""
        return self.offset


class SiteInput(ABC):
    """What changes the output of a site in training forwards, as an objective may wish."""

    @abstractmethod
    def change(self, y: Tensor, dropped: Tensor, adapter: SiteAdapter, base: BaseWeight) -> Tensor:
        """Return the site's output y (..., out), or its change of it, changed; `dropped` (..., in) is what A gets."""


class SiteAdapter(nn.Module):
    """One adapter on one site: dropout, factors, combine."""

    def __init__(self, factors: Factors, combine: Combine, dropout: float) -> None:
        super().__init__()
        self.factors = factors
        self.combine = combine
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.input: SiteInput | None = None

    def delta(self, x: Tensor, y0: Tensor, base: BaseWeight) -> Tensor:
        """Return the adapter's contribution to y0 (..., out) for input x (..., in), in the adapter's dtype."""
        dropped = self.combine.drop(x, self.dropout)
        delta = self.combine.delta(x, dropped, y0, base, self.factors)
        return self.input.change(delta, dropped, self, base) if self.input is not None and self.training else delta

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return y (..., out) of the frozen linear W0 (out, in), b (out,) with this adapter alone."""
        dropped = self.combine.drop(x, self.dropout)
        y = self.combine.output(x, dropped, weight, bias, self.factors)
        if self.input is None or not self.training:
            return y
        return self.input.change(y, dropped, self, GivenWeight(weight, bias))

    def delta_weight(self, weight: Tensor) -> Tensor:
        """Return W' − W0 (out, in); see `Combine.delta_weight`."""
        return self.combine.delta_weight(weight, self.factors)


def scaling(alpha: float, rank: int, use_rslora: bool = False) -> float:
    """Return s: alpha/r, or alpha/√r with rsLoRA (Kalajdzievski, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def check_lr_ratio(ratio: Any) -> None:
    """Raise a UserError when `ratio` (LoRA+: η_B/η_A) is not a finite number above 0."""
    if not is_number(ratio) or not 0 < ratio < math.inf:
        raise UserError(f"loraplus_lr_ratio is {ratio!r}: give a number above 0, such as 16")


def uniform(shape: tuple[int, int], bound: float, generator: torch.Generator) -> Tensor:
    """Return a float32 tensor with entries from U(−bound, bound)."""
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


def check_rank(site: str, rank: Any, limit: int | None = None) -> int:
    """Return `rank` as an int.

    Raises:
        UserError: when it is not a positive whole number, or larger than `limit`.
    """
    if not is_whole(rank) or rank < 1:
        raise UserError(f"rank of {site} is {rank!r}: give a whole number of at least 1, or leave the site out")
    if limit is not None and rank > limit:
        raise UserError(f"rank of {site} is {rank}, but this site allows at most {limit}: lower r or rank_pattern")
    return rank
