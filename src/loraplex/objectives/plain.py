"""The plain objective: the trainer's own loss, untouched."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.adapters.registry import REGISTRY, Axis, Method


@dataclass(frozen=True)
class Plain:
    """Options of the plain objective: there are none."""


REGISTRY.add(
    Method(
        name="plain",
        axis=Axis.OBJECTIVE,
        options=Plain,
        summary="the trainer's own loss",
        paper="–",
        parameters="–",
    )
)
