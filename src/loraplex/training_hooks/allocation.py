"""Drives an allocation: asks the allocator when it is due, moves the gates, and finishes the adapter at the end.

`transformers.Trainer` and what inherits from it are driven by a callback (`allocation_in_trainer`); a loop of one's own
calls `start_allocation` and `AllocationController.step`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.adapters.registry import describe_member
from loraplex.allocation.budget import Budget
from loraplex.allocation.contracts import Batch, Candidate, Gates, Revision, ScoringContext
from loraplex.allocation.plan import Plan
from loraplex.batch_loss.trainer import mean_loss
from loraplex.errors import UserError
from loraplex.option_values import is_whole
from loraplex.processes import several_processes
from loraplex.tuner.candidates import candidates_of
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.model import LoraplexTuner

logger = logging.getLogger("loraplex.allocation")


@dataclass(frozen=True)
class Decision:
    """One revision, as it is recorded."""

    step: int
    plan: Plan
    spent: int
    budget: Budget
    revision: Revision

    @property
    def unspent(self) -> int:
        """What the budget had left."""
        return self.budget.amount - self.spent

    def describe(self) -> dict[str, Any]:
        """Return it as plain data: step, ranks by site, budget, spent, unspent, scores, remark."""
        return {
            "step": self.step,
            "ranks": dict(self.plan.ranks),
            "budget": {"amount": self.budget.amount, "unit": self.budget.unit},
            "spent": self.spent,
            "unspent": self.unspent,
            "scores": dict(self.revision.scores),
            "remark": self.revision.remark,
        }


class AllocationController:
    """The allocation of one adapter, from its beginning to its end."""

    def __init__(
        self,
        tuner: LoraplexTuner,
        adapter_name: str,
        batches: Callable[[int], Sequence[Batch]],
        total_steps: int,
        steps_per_epoch: int,
        say: Callable[[str], None] = lambda text: None,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        config = tuner.peft_config[adapter_name]
        assert isinstance(config, AdapterConfig)
        self.tuner, self.adapter_name, self.config = tuner, adapter_name, config
        self.allocator = config.allocation
        self.decisions: list[Decision] = []
        self.done = 0
        self.total_steps = total_steps
        self._batches, self._say, self._precision = batches, say, precision
        self._due = frozenset(self.allocator.due(total_steps, steps_per_epoch))
        if not any(step < total_steps for step in self._due):
            raise UserError(
                f"the allocation of '{adapter_name}' never acts: no revision is due before the last of {total_steps:,} "
                f"steps, {steps_per_epoch:,} an epoch: lower its {self.allocator.delay}"
            )
        self.candidates = candidates_of(tuner, adapter_name)
        start, self.budget = self.allocator.start(self.candidates, config.rank_of)
        self._start = start

    def begin(self, step: int = 0) -> None:
        """Begin at `step` optimizer steps; above 0 the gates are those of the checkpoint that was loaded."""
        self.config.state.live, self.config.state.finished_ranks = True, None
        self.done = step
        self.config.state.driven = True
        if step == 0:
            self._set(self._start)
            self._revise_if_due()

    def step(self) -> None:
        """Count an optimizer step and revise where that is due; after the last one, finish."""
        self.done += 1
        if self.done >= self.total_steps:
            self.finish()
        else:
            self._revise_if_due()

    def reached(self, step: int) -> bool:
        """Take note that `step` optimizer steps are done; revise where that is due, and return whether it was."""
        if step <= self.done:
            return False
        self.done = step
        return self._revise_if_due()

    def finish(self) -> None:
        """End the allocation: from now on the adapter is saved without its closed ranks."""
        if not self.config.state.driven:
            return
        self.config.state.driven = False
        ranks = self.tuner.finish(self.adapter_name)
        spent = self.budget.spent(self.candidates, ranks)
        if spent > self.budget.amount:
            logger.warning(
                "adapter '%s' ends with %s of %s: training stopped, or its best checkpoint was written, before the "
                "first revision",
                *(self.adapter_name, f"{spent:,}", self.budget),
            )

    def context(self) -> ScoringContext:
        """Return what a revision looks at now.

        Raises:
            UserError: when there is no batch to look at.
        """
        batches = [_on(batch, self.tuner.model) for batch in self._batches(self.allocator.batches)]
        if not batches:
            raise UserError("the allocation has no batch to look at: the training set is empty")
        assert self.config.seed is not None
        return ScoringContext(
            candidates=self.candidates,
            budget=self.budget,
            batches=batches,
            model=self.tuner.model,
            step=self.done,
            seed=self.config.seed,
            say=self._say,
            quick=lambda batch: mean_loss(self.tuner.model, batch, self.config.padding_free),
            precision=self._precision,
        )

    def _revise_if_due(self) -> bool:
        if self.done not in self._due:
            return False
        revision = self.allocator.revise(self.context())
        for name, score in revision.scores.items():
            if not math.isfinite(score):
                raise UserError(
                    f"the score of {name} at step {self.done} is {score}: the loss of the first batches or its "
                    "gradient is not finite; look at the first rows of the training set, or lower the learning rate"
                )
        # all processes have the same scores; should one round otherwise, the first decides
        revision = replace(revision, gates=_of_the_first_process(self.candidates, revision.gates))
        spent = self.budget.spent(self.candidates, revision.plan.ranks)
        if spent > self.budget.amount:
            raise AssertionError(f"{self.allocator} spends {spent} of {self.budget}")
        if not revision.plan.adapted:
            raise UserError(self.allocator.nothing_left(self.budget))
        self._set(revision.gates)
        decision = Decision(self.done, revision.plan, spent, self.budget, revision)
        self.decisions.append(decision)
        adapted, remark = len(revision.plan.adapted), f"; {revision.remark}" if revision.remark else ""
        self._say(
            f"step {self.done}: {adapted} of {len(self.candidates)} sites on, {spent:,} of {self.budget} "
            f"({decision.unspent:,} unspent){remark}"
        )
        return True

    def _set(self, gates: Gates) -> None:
        for candidate in self.candidates:
            candidate.gate.copy_(gates[candidate.name])


def start_allocation(
    model: nn.Module,
    batches: Iterable[Batch],
    total_steps: int,
    *,
    steps_per_epoch: int | None = None,
    done: int = 0,
    adapter_name: str = "default",
    say: Callable[[str], None] = lambda text: None,
) -> AllocationController:
    """Begin the allocation of a model that a loop of your own trains; call the result's `step()` after every step.

    `batches` are what the model is called with, labels included; the first ones are looked at, at every revision.
    With the last of `total_steps` steps the allocation finishes. A loop that trains under autocast makes these calls
    under it too. One that goes on from a checkpoint says how many steps are `done`: gates are then as they were loaded.

    Raises:
        UserError: when the model carries no adapter of ours with an allocation that moves ranks, or when none of its
            revisions falls into these steps.
    """
    for name, steps, least in (("total_steps", total_steps, 1), ("done", done, 0)):
        if not is_whole(steps) or steps < least:
            raise UserError(f"{name} is {steps!r}: give a whole number of optimizer steps")
    tuner = getattr(model, "base_model", None)
    config = getattr(tuner, "peft_config", {}).get(adapter_name)
    if not isinstance(tuner, LoraplexTuner) or not isinstance(config, AdapterConfig):
        raise UserError(f"the model carries no loraplex adapter '{adapter_name}'")
    if not config.allocation.moves_ranks:
        raise UserError(
            f"the allocation of '{adapter_name}' is {describe_member(config.allocation)!r}, which moves no ranks"
        )
    kept: list[Batch] = []
    source = iter(batches)

    def first(count: int) -> Sequence[Batch]:
        while len(kept) < count and (batch := next(source, None)) is not None:
            kept.append(batch)
        return kept[:count]

    controller = AllocationController(tuner, adapter_name, first, total_steps, steps_per_epoch or total_steps, say)
    controller.begin(done)
    return controller


def _of_the_first_process(candidates: Sequence[Candidate], gates: Gates) -> Gates:
    """Return the gates that the first process of a distributed run has."""
    if not several_processes():
        return gates
    agreed = {candidate.name: gates[candidate.name].to(candidate.gate) for candidate in candidates}
    for gate in agreed.values():
        torch.distributed.broadcast(gate, src=0)
    return agreed


def _on(batch: Batch, model: nn.Module) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise UserError(f"a batch is a {type(batch).__name__}: give mappings of what the model is called with")
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
