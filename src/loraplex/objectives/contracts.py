"""What an objective is: how it is attached to a model, how it computes the loss of a training batch, how it leaves.

Plain torch; nothing here knows PEFT. The tuner builds an objective from its options for every adapter that has one,
owns its tensors as long as it is attached, and calls `loss` in every training forward in place of its own.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist

from loraplex.adapters.contracts import Rate, SiteAdapter
from loraplex.errors import UserError
from loraplex.processes import several_processes

if TYPE_CHECKING:
    from loraplex.kernels.distilled_head import Distilled, Weights


def refuse_compiling() -> None:
    """Refuse to be compiled.

    Raises:
        UserError: where torch.compile traces this call.
    """
    if torch.compiler.is_compiling():
        _say_compiling()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _say_compiling() -> None:
    """Raise outside of what is compiled: in there, an error makes the compiler run the same code uncompiled."""
    raise UserError(
        "an objective cannot train under torch.compile, which mixes up its passes: leave it out (torch_compile=False), "
        "or set the adapter's objective to plain"
    )


@dataclass(frozen=True)
class ObjectiveInit:
    """All that an objective may look at when it is built."""

    model: nn.Module
    """The base model with its adapters."""
    sites: Mapping[str, SiteAdapter]
    """The adapters of the sites by their full names, in the order of the model's modules."""
    widths: Mapping[str, int]
    """Output features of the sites."""
    seed: int
    identity: bool = True
    """False asks for an initialization that acts visibly, for tests."""


class ObjectiveOptions(Protocol):
    """Options of an objective: they say what a step costs, and build the objective."""

    @property
    def passes(self) -> float:
        """How many passes over a batch a step computes on average; the plain loss computes one."""

    @property
    def most_passes(self) -> float:
        """How many passes a step computes at most: what memory is planned by."""

    def build(self, init: ObjectiveInit) -> Objective | None:
        """Return the objective for an adapter that has just been injected, None where the trainer's loss is enough."""


@dataclass(frozen=True)
class SecondPass:
    """A second forward pass over some sequences of a batch, from their first position of interest to their last."""

    tokens: int
    """How many tokens it computes."""
    rows: Tensor
    """(k,) those that predict a learned token, as positions among the tokens."""
    chosen: Tensor
    """(k,) the same as indices into the batch's `rows`, rising."""
    hidden: Callable[[], Tensor]
    """Runs it and returns the last hidden states at `rows`, (k, d)."""


class Batch(ABC):
    """One training batch. All tokens lie in a row of N; the sequences of a padded batch one after the other."""

    sequence: Tensor
    """(N,) number of the sequence that a token belongs to, never falling."""
    sequences: int
    """How many sequences there are."""
    real: Tensor
    """(N,) false for padding."""
    is_target: Tensor
    """(N,) whether a token is learned: its label is not ignored."""
    rows: Tensor
    """(n,) positions in the row of N that predict a learned token, rising."""

    @property
    def samples(self) -> Tensor:
        """(m,) the sequences with something to predict, rising; padding at the end of a flat row is none of them."""
        found: Tensor = self.sequence[self.rows].unique()
        return found

    @abstractmethod
    def hidden(self, *, keep: bool = False) -> Tensor:
        """Run the backbone once and return its last hidden states at `rows`, (n, d).

        With `keep`, keys and values are kept for a second pass, where that is possible.
        """

    @abstractmethod
    def second_pass(self, sequences: Tensor, *, in_full: bool = False) -> SecondPass:
        """Return how to run the backbone a second time for the chosen `sequences` (sequences,), true or false.

        The second pass may differ from the first at `rows` and after them only. Where the first pass was kept, nothing
        before them is computed again: the second attends to the first's keys and values, which is the same, gradients
        included. `in_full` computes every token of the batch in any case.
        """

    @abstractmethod
    def log_probs(self, hidden: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return log p(label), the entropy of p and whether the label is on top, for `rows`, or those `chosen`."""

    @abstractmethod
    def distilled(self, teacher: Tensor, student: Tensor, weights: Weights, chosen: Tensor | None = None) -> Distilled:
        """Return `kernels.distilled_head.distilled_log_probs` of `rows`, or of those `chosen`."""


@dataclass(frozen=True)
class Outcome:
    """What an objective makes of a batch, per position that predicts a learned token."""

    log_probs: Tensor
    """(n,) minus the loss of every position; their negative sum over the number of learned tokens is the loss."""
    entropy: Tensor
    """(n,) of the plain forward pass, without gradient."""
    top: Tensor
    """(n,) whether the label is the most likely token in the plain forward pass."""


class Objective(nn.Module, ABC):
    """A loss with tensors of its own, which travel with a checkpoint in mid-training, as seed and step do."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.step = 0
        """Optimizer steps that are done: told by a trainer, counted where there is none."""
        self.total: int | None = None
        """Optimizer steps in all, None where nobody has said."""
        self._agreed = False

    def agree(self, device: torch.device) -> None:
        """Take over the first process's seed and step, once, where several train: seeds may be drawn in each."""
        if self._agreed or not several_processes():
            return
        state = self.get_extra_state().to(device)
        dist.broadcast(state, 0)
        self.set_extra_state(state.cpu())
        self._agreed = True

    def get_extra_state(self) -> Tensor:
        """Return what decides the draws of the next step: only tensors come back when a trainer resumes."""
        return torch.tensor([self.seed, self.step])

    def set_extra_state(self, state: Tensor) -> None:
        """Take over seed and step."""
        self.seed, self.step = state.tolist()

    @abstractmethod
    def attach(self, model: nn.Module, sites: Mapping[str, SiteAdapter]) -> None:
        """Take hold of a model: register hooks, let sites take input. Nothing may change in `eval()`."""

    @abstractmethod
    def loss(self, batch: Batch) -> Outcome:
        """Return the loss of a training batch, position by position.

        Raises:
            UserError: when the objective could not act on this batch.
        """

    @abstractmethod
    def detach(self, model: nn.Module) -> None:
        """Let go of everything that `attach` took hold of."""

    def rates(self) -> Iterator[tuple[nn.Parameter, Rate]]:
        """Yield the parameters that do not learn at the optimizer's rate, or are not to decay."""
        yield from ()

    def report(self) -> dict[str, float]:
        """Return the means of what is worth logging since the last call."""
        return {}

    def kinds_of_steps(self) -> list[tuple[float, contextlib.AbstractContextManager[None]]]:
        """Return the kinds of steps there are: how often each occurs, and a context in which all steps are of it."""
        return [(1.0, contextlib.nullcontext())]


@dataclass
class Means:
    """Means of named numbers over many batches, without waiting for the device."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        """Take `values` into the mean of `name`."""
        count = torch.tensor(float(values.numel()), device=values.device)
        total = values.detach().sum(dtype=torch.float32)
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts[name] + count if name in self.counts else count

    def take(self) -> dict[str, float]:
        """Return the means and start again; a name without any value is left out."""
        means = {name: float(self.sums[name] / self.counts[name]) for name in self.sums if self.counts[name] > 0}
        self.sums.clear()
        self.counts.clear()
        return means
