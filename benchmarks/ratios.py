"""Ratios of two contestants, round by round, and how sure their median is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median
from typing import Any, Literal

from benchmarks.rounds import Record

_ALLOWED_MISS = 0.02
"""How far the 95 % bound may lie on the wrong side of a goal that the median reaches."""


@dataclass(frozen=True)
class Interval:
    """A median and bounds that hold it with probability `coverage`."""

    median: float
    low: float
    high: float
    coverage: float


def median_interval(values: Sequence[float], wanted: float = 0.95) -> Interval:
    """Return the narrowest pair of order statistics, x(k) and x(n+1−k), that covers the median with `wanted`.

    The coverage 1 − 2·P(Binomial(n, ½) < k) holds whatever the distribution. Below six values no pair reaches .95:
    the smallest and the largest are returned with the coverage that they have.
    """
    ordered, n = sorted(values), len(values)

    def coverage(k: int) -> float:
        return 1 - 2 * sum(comb(n, i) for i in range(k)) / float(2**n)

    k = max((k for k in range(1, n // 2 + 1) if coverage(k) >= wanted), default=1)
    return Interval(median(ordered), ordered[k - 1], ordered[n - k], coverage(k))


@dataclass(frozen=True)
class Comparison:
    """One contestant over another.

    `speed` is work per second, the more the better; `time` per round and `memory` at the peak, the less the better.
    """

    of: str
    over: str
    quantity: Literal["speed", "time", "memory"] = "speed"
    goal: float | None = None

    def measure(self, records: dict[str, Record]) -> dict[str, Any]:
        """Return the comparison as JSON: the ratio of every round, their median and its interval, and the verdict."""
        a, b = records[self.of], records[self.over]
        if self.quantity == "memory":
            ratios = [a.peak_bytes / b.peak_bytes]
        else:
            ratios = [theirs / mine for mine, theirs in zip(a.seconds, b.seconds, strict=True)]
            ratios = [1 / ratio for ratio in ratios] if self.quantity == "time" else ratios
        return {"of": self.of, "over": self.over, "quantity": self.quantity, **judged(ratios, self.quantity, self.goal)}


def judged(ratios: Sequence[float], quantity: str, goal: float | None) -> dict[str, Any]:
    """Return the ratios with their median, its bounds, whether the goal is reached and whether the first is ahead."""
    found = median_interval(ratios) if len(ratios) > 1 else Interval(ratios[0], ratios[0], ratios[0], 0.0)
    # Turned so that more is better.
    sign = 1 if quantity == "speed" else -1
    bound = found.low if quantity == "speed" else found.high
    return {
        "ratios": list(ratios),
        "median": found.median,
        "low": found.low,
        "high": found.high,
        "coverage": found.coverage,
        "ahead": sign * (found.median - 1) > 0,
        "goal": goal,
        "reached": None
        if goal is None
        else sign * (found.median - goal) >= 0 and sign * (bound - goal) >= -_ALLOWED_MISS,
    }
