"""Uniform allocation: every site gets the configured rank. What LoRA does; no paper of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from loraplex.adapters.registry import REGISTRY, Axis, Method
from loraplex.allocation.budget import Budget
from loraplex.allocation.contracts import Candidate, Gates, Revision, Scene
from loraplex.allocation.shortcuts import ShortcutOptions


@dataclass(frozen=True)
class Uniform(ShortcutOptions):
    """Options of the uniform allocation: whether there are shortcuts, all of them open."""

    moves_ranks = False

    def due(self, total_steps: int, steps_per_epoch: int) -> Sequence[int]:
        """Return nothing: ranks stay as they are configured."""
        return ()

    def start(self, candidates: Sequence[Candidate], rank: Callable[[str], int]) -> tuple[Gates, Budget]:
        """Return all gates open, which is what they cost."""
        gates = {candidate.name: torch.ones(candidate.ranks) for candidate in candidates}
        return gates, Budget(sum(candidate.ranks for candidate in candidates), "ranks")

    def revise(self, scene: Scene) -> Revision:
        """Return the gates as they are."""
        return Revision({candidate.name: candidate.gate for candidate in scene.candidates})


REGISTRY.add(
    Method(
        name="uniform",
        axis=Axis.ALLOCATION,
        options=Uniform,
        summary="the configured rank everywhere",
        paper="arXiv 2106.09685",
        parameters="–",
    )
)
