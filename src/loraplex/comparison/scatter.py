"""Accuracy against what an arm costs, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import altair as alt

from loraplex.comparison.results import Run
from loraplex.comparison.scene import ChartContext, Plot, interval, percent, percent_axis

_HEIGHT = 330
# How much more than the smallest value the largest must be for a scale of powers of ten, and for a scale of its own.
_LOGARITHMIC, _DISTINCT = 6.0, 1.5


class _CostScale(NamedTuple):
    """The horizontal scale."""

    low: float
    high: float
    ticks: Sequence[float] | None
    """Given for a scale of powers of ten only."""

    def encoding(self, title: str, digits: str) -> alt.X:
        """Return the encoding of the field x."""
        kind = {"type": "log"} if self.ticks is not None else {"zero": False}
        axis = alt.Axis(format=digits, values=self.ticks or alt.Undefined)
        return alt.X("x:Q", title=title, axis=axis, scale=alt.Scale(domain=[self.low, self.high], nice=False, **kind))


def against_parameters(scene: ChartContext) -> Plot | None:
    """Return accuracy over the number of trainable parameters."""
    return _scatter(
        scene,
        "accuracy-by-parameters",
        "Accuracy and parameters",
        "trainable parameters",
        ".3~s",
        lambda run: run.parameters,
    )


def against_time(scene: ChartContext) -> Plot | None:
    """Return accuracy over the time of a whole training."""
    longest = max((run.training_seconds or 0.0 for arm in scene.comparison.arms for run in arm.runs), default=0.0)
    unit, seconds = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    return _scatter(
        scene,
        "accuracy-by-time",
        "Accuracy and training time",
        f"training time in {unit}",
        ".3~r",
        lambda run: None if run.training_seconds is None else run.training_seconds / seconds,
    )


def _scatter(
    scene: ChartContext, name: str, title: str, cost: str, digits: str, measure: Callable[[Run], float | None]
) -> Plot | None:
    """Return accuracy over a cost, with the arms that no other beats in both joined by the Pareto front."""
    costs = {
        row.arm: [value for run in scene.finished(scene.comparison.arm(row.arm)) if (value := measure(run)) is not None]
        for row in scene.summary.arms
    }
    data: list[dict[str, Any]] = [
        {"arm": row.arm, "x": fmean(costs[row.arm]), "mean": row.mean} | interval(row)
        for row in scene.summary.arms
        if costs[row.arm]
    ]
    if not data:
        return None
    scale = _cost_scale([row["x"] for row in data])
    across = scale.encoding(cost, digits)
    accuracies = _accuracy_domain(data)
    up = alt.Y("mean:Q", title="accuracy", axis=percent_axis())
    up = up.scale(alt.Scale(domain=accuracies, nice=False, zero=False))
    rows = scene.base(data)
    # Cheapest first, an arm is on the front when no arm before it is as accurate.
    cheapest: list[alt.SortField | dict[str, str]] = [
        alt.SortField("x", order="ascending"),
        alt.SortField("mean", order="descending"),
    ]
    front = (
        rows.transform_window(best="max(mean)", frame=[None, 0], sort=cheapest)
        .transform_filter("datum.mean == datum.best")
        .transform_window(place="row_number()", groupby=["best"], sort=cheapest)
        .transform_filter("datum.place == 1")
    )
    tooltip = [alt.Tooltip("arm:N"), *percent(mean="accuracy", low="95 % from", high="95 % to")]
    tooltip.append(alt.Tooltip("x:Q", title=cost, format=",.4~r"))
    layers = [
        front.mark_line(style="front", interpolate="step-after").encode(x=across, y=up, order="x:Q"),
        rows.mark_rule(strokeWidth=2, opacity=0.3).encode(
            x=across, y=alt.Y("low:Q", title="accuracy"), y2="high:Q", color=scene.color()
        ),
        front.mark_point(size=290, style="ring", shape="circle").encode(x=across, y=up),
        rows.mark_point(size=110, filled=True, opacity=1).encode(
            x=across, y=up, color=scene.color(), shape=scene.shape(), tooltip=tooltip
        ),
    ]
    caption = (
        "Ringed and joined: the Pareto front, that is every arm that no other beats in both. Means over the seeds."
    )
    chart = scene.layered(*layers, height=_HEIGHT, description=f"{title}. {caption}")
    return Plot(name, title, caption, chart, half=True)


def _cost_scale(values: Sequence[float]) -> _CostScale:
    """Return a scale on which values that hardly differ stay together; for those far apart, of powers of ten."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= _LOGARITHMIC:
        margin = (high / low) ** 0.15
        low, high = low / margin, high * margin
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if high / low < 300 else (1,)
        ticks = [tick for power in powers for digit in digits if low <= (tick := digit * 10.0**power) <= high]
        return _CostScale(low, high, ticks)
    spread = max(high - low, (_DISTINCT - 1) * high, 1e-9)
    middle = (low + high) / 2
    return _CostScale(max(0.0, middle - 0.65 * spread), middle + 0.65 * spread, None)


def _accuracy_domain(rows: Sequence[dict[str, Any]]) -> list[float]:
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    margin = max(0.08 * (high - low), 0.01)
    return [max(0.0, low - margin), min(1.0, high + margin)]
