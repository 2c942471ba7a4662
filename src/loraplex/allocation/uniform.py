"""Uniform allocation: every site gets the configured rank. What LoRA does; no paper of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from loraplex.adapters.registry import REGISTRY, Axis, Method
from loraplex.allocation.plan import Plan
from loraplex.allocation.sites import Site


@dataclass(frozen=True)
class Uniform:
    """Options of the uniform allocation: there are none."""

    def plan(self, sites: Iterable[Site], rank: Callable[[str], int]) -> Plan:
        """Return the plan that gives each site the rank configured for its name."""
        return Plan({site.name: rank(site.name) for site in sites})


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
