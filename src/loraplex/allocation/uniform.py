"""Uniform allocation: every site gets the configured rank, or what a plan gives it. What LoRA does; no paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loraplex.adapters.registry import REGISTRY, Axis, Method
from loraplex.allocation.budget import Budget
from loraplex.allocation.contracts import Allocator, Candidate, Gates, Revision, ScoringContext
from loraplex.allocation.plan import Plan
from loraplex.allocation.shortcuts import ShortcutOptions
from loraplex.allocation.sites import is_edge
from loraplex.errors import UserError


@dataclass(frozen=True)
class Uniform(ShortcutOptions):
    """Options of the uniform allocation: ranks site by site, and whether there are shortcuts, all of them open."""

    plan: Any = None
    """Ranks by full site name, or a file of them such as a run's plan.json; what has 0 or no rank is not adapted."""

    moves_ranks = False

    def __post_init__(self) -> None:
        """Read the plan: from here on it is its ranks, wherever the file goes."""
        super().__post_init__()
        plan = self.plan
        if plan is None:
            return
        if isinstance(plan, (str, Path)):
            plan = Plan.load(Path(plan))
        elif isinstance(plan, Mapping):
            plan = Plan(plan)
        if not isinstance(plan, Plan):
            raise UserError(f"plan is {plan!r}: give the path of a plan.json, or ranks by site name")
        if not plan.adapted:
            raise UserError("the plan gives no site a rank above 0: there is nothing to train")
        object.__setattr__(self, "plan", dict(plan.ranks))
        # it says which edges too
        object.__setattr__(self, "shortcuts", tuple(name for name in plan.adapted if is_edge(name)) or False)

    @property
    def given(self) -> Plan | None:
        """The plan, if there is one."""
        return None if self.plan is None else Plan(self.plan)

    def without_given(self) -> Allocator:
        """Return the options without the plan."""
        return replace(self, plan=None)

    def due(self, total_steps: int, steps_per_epoch: int) -> Sequence[int]:
        """Return nothing: ranks stay as they are configured."""
        return ()

    def start(self, candidates: Sequence[Candidate], rank: Callable[[str], int]) -> tuple[Gates, Budget]:
        """Return all gates open, which is what they cost."""
        gates = {candidate.name: torch.ones(candidate.ranks) for candidate in candidates}
        return gates, Budget(sum(candidate.ranks for candidate in candidates), "ranks")

    def revise(self, context: ScoringContext) -> Revision:
        """Return the gates as they are."""
        return Revision({candidate.name: candidate.gate for candidate in context.candidates})


REGISTRY.add(
    Method(
        name="uniform",
        axis=Axis.ALLOCATION,
        options=Uniform,
        summary="the configured rank everywhere",
        paper="arXiv 2106.09685",
        parameters="–",
        default=True,
    )
)
