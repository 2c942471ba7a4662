"""What an allocator sees and decides: candidates with rank gates, a budget, and revisions before or during training.

Plain torch; nothing here knows PEFT. An allocator opens and closes ranks by gates only: shapes, parameters and the
state of the optimizer stay, and what is written at the end leaves the closed ranks out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loraplex.adapters.contracts import SiteAdapter
from loraplex.allocation.budget import Budget
from loraplex.allocation.edges import Edges
from loraplex.allocation.plan import Plan
from loraplex.allocation.sites import Site
from loraplex.errors import UserError
from loraplex.seeds import seeded

Gates = Mapping[str, Tensor]
"""By site name: (r,) of ones (open) and zeros (closed)."""
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One site that may get ranks."""

    site: Site
    layer: nn.Module
    """The module in the model whose output the adapter changes."""
    adapter: SiteAdapter
    weight: Callable[[], Tensor] | None
    """Gives the frozen weight (out, in); None on a residual edge, which has none."""

    @property
    def name(self) -> str:
        """Full module name in the base model."""
        return self.site.name

    @property
    def gate(self) -> Tensor:
        """(r,): which ranks are open. Written in place."""
        return self.adapter.factors.gate

    @property
    def ranks(self) -> int:
        """Number of ranks, open and closed."""
        return self.adapter.factors.rank

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of the factors."""
        return [parameter for parameter in self.adapter.factors.parameters() if parameter.requires_grad]

    def cost(self, ranks: int) -> int:
        """Return how many parameters the site trains with that many open ranks; 0 for a site that is off."""
        beside = sum(parameter.numel() for parameter in self.adapter.combine.parameters())
        return ranks * (self.site.in_features + self.site.out_features) + beside if ranks else 0


@dataclass(frozen=True)
class ScoringContext:
    """All that a revision may look at."""

    candidates: Sequence[Candidate]
    budget: Budget
    batches: Sequence[Batch]
    """The same at every revision: the first ones of the training set, in its order."""
    model: nn.Module
    """The base model with its adapters, called as its own class wants it: no packing, nothing fused over positions."""
    step: int
    """Optimizer steps done."""
    seed: int
    say: Callable[[str], None] = lambda text: None
    quick: Callable[[Batch], Tensor] | None = None
    """Gives the loss of a batch as a training step computes it, where that is quicker than the model's own call."""
    precision: Callable[[], AbstractContextManager[object]] = nullcontext
    """What losses are computed under: autocast, where training steps are."""

    def loss(self, batch: Batch) -> Tensor:
        """Return the model's own loss on a batch, differentiable: the mean over its targets."""
        return self._computed(lambda batch: self.model(**batch).loss, batch)

    def loss_alone(self, batch: Batch) -> Tensor:
        """Return the same loss for who looks at nothing else: gradients of A, B and W0 once, or its value.

        Padding and logits that no label asks for may be left out.
        """
        return self.loss(batch) if self.quick is None else self._computed(self.quick, batch)

    def _computed(self, loss: Callable[[Batch], Tensor | None], batch: Batch) -> Tensor:
        with self.precision():
            found = loss(batch)
        if found is None:
            raise UserError(
                f"the model gives no loss for a batch with the keys {', '.join(batch)}: an allocation scores sites by "
                "the loss, so its batches need labels"
            )
        return found

    def generator(self) -> torch.Generator:
        """Return a generator that depends on the seed and the step, the same in every process."""
        return seeded(self.seed, self.step)


@dataclass(frozen=True)
class Revision:
    """What a revision decided."""

    gates: Gates
    scores: Mapping[str, float] = field(default_factory=dict)
    """By site name, or by "site[rank]" where ranks are scored."""
    remark: str = ""
    """What a reader of the plan should know: ties that chance has broken."""

    @property
    def plan(self) -> Plan:
        """The number of open ranks by site."""
        return Plan({name: int(gate.sum()) for name, gate in self.gates.items()})


class Allocator(ABC):
    """The options of an allocation method, which carry it out: a frozen dataclass. What changes is in the gates."""

    moves_ranks = True
    """Whether ranks are opened or closed at all, so that somebody has to drive it."""
    batches = 1
    """How many batches a revision looks at."""
    delay: ClassVar[str]
    """The option that says when the first revision is due."""

    def nothing_left(self, budget: Budget) -> str:
        """Return what to say when a revision leaves no site a rank."""
        return f"the budget of {budget} does not pay for a single site: raise share, or lower r"

    @property
    def edges(self) -> Edges | None:
        """Which residual edges are candidates beside the linear maps; None where there are none."""
        return None

    @property
    def given(self) -> Plan | None:
        """Ranks by site that take the place of the configured ones; None where every site has its configured rank."""
        return None

    def without_given(self) -> Allocator:
        """Return these options once the given ranks stand in the configuration itself."""
        return self

    def allocated_rank(self, rank: int) -> int:
        """Return how many ranks a site is built with that starts with `rank` open ones."""
        return rank

    @abstractmethod
    def due(self, total_steps: int, steps_per_epoch: int) -> Sequence[int]:
        """Return the numbers of done optimizer steps at which ranks are revised; 0 is before training."""

    @abstractmethod
    def start(self, candidates: Sequence[Candidate], rank: Callable[[str], int]) -> tuple[Gates, Budget]:
        """Return the gates before the first revision, and the budget; `rank` gives what is configured for a site."""

    @abstractmethod
    def revise(self, context: ScoringContext) -> Revision:
        """Return the gates from here on. The gates in the scene may be moved for scoring; the caller restores them.

        Raises:
            UserError: when the scores do not tell the candidates apart.
        """
