"""What the statistics say about a comparison, as plain data for the report and the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.comparison.paired import Verdict


@dataclass(frozen=True)
class ArmStatistics:
    """One arm over its finished runs; accuracies are shares from 0 to 1."""

    arm: str
    seeds: int
    mean: float
    interval: tuple[float, float] | None
    """95 % interval of the mean over seeds; None with fewer than two finished seeds."""
    between_seeds: float | None
    """Standard deviation of the accuracy between seeds."""
    standard_error: float
    """Of the mean, from the test items alone."""


@dataclass(frozen=True)
class Contrast:
    """One arm against the reference arm, on the seeds that both have finished."""

    arm: str
    reference: str
    seeds: int
    items: int
    difference: float
    """Mean accuracy of the arm minus that of the reference."""
    interval: tuple[float, float]
    """95 % interval of the difference; with one seed it allows for the items alone."""
    p_value: float
    """Of no difference; with one seed that of two adapters, which says nothing about other seeds."""
    adjusted_p_value: float
    """Corrected for the number of arms."""
    detectable: float
    """The true difference that this size would find with a probability of 80 %; with one seed that of two adapters."""
    seeds_needed: int | None
    """Seeds in all with which one point could be detected; None where seeds alone cannot do it."""
    verdict: Verdict
    """Always "open" with one seed, whatever the p-value is."""
    sentence: str
    """The result in plain words."""


@dataclass(frozen=True)
class Summary:
    """All arms, all contrasts, and the sentence that comes before them."""

    arms: list[ArmStatistics]
    contrasts: list[Contrast]
    beforehand: str
    """What this size could have detected, to be read before the result."""
