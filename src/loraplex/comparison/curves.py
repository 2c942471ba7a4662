"""Long learning curves, brought to a size that a chart can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from loraplex.plots import smoothed

_POINTS = 160
# Share of a curve over which its points are averaged.
_SMOOTHING = 0.02


def course(loss: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most 160 points of a learning curve, lightly smoothed.

    Values that are not finite are left out: a chart has no place for them.
    """
    finite = [(step, value) for step, value in loss if math.isfinite(value)]
    stride = max(1, math.ceil(len(finite) / _POINTS))
    chunks = [finite[start : start + stride] for start in range(0, len(finite), stride)]
    steps = [chunk[-1][0] for chunk in chunks]
    means = smoothed([fmean(value for _, value in chunk) for chunk in chunks], max(0.5, _SMOOTHING * len(chunks)))
    return [(step, round(mean, 4)) for step, mean in zip(steps, means, strict=True)]
