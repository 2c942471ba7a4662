"""The plain objective: the trainer's own loss, untouched."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.adapters.registry import REGISTRY, Axis, Method, SaveFormat
from loraplex.objectives.contracts import ObjectiveInit


@dataclass(frozen=True)
class Plain:
    """Options of the plain objective: there are none."""

    passes = 1.0
    most_passes = 1.0

    def build(self, init: ObjectiveInit) -> None:
        """Return nothing: the trainer's loss needs nobody else."""


REGISTRY.add(
    Method(
        name="plain",
        axis=Axis.OBJECTIVE,
        options=Plain,
        summary="the trainer's own loss",
        paper="–",
        parameters="–",
        save_format=SaveFormat.LORA,
        default=True,
    )
)
