"""What all charts of a comparison have in common.

Every layer that shows an arm is filtered by the parameter `shown`, a list of arm names, so a page can hide an arm in
all charts by setting one signal; the Pareto front and the reference line then follow what is left. Colors come from
`plots.chart_config`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from loraplex.comparison.results import Arm, Comparison, Run
from loraplex.comparison.summary import ArmStatistics, Summary
from loraplex.plots import chart_of

SHOWN = "shown"
_IS_SHOWN = f"indexof({SHOWN}, datum.arm) >= 0"


@dataclass(frozen=True)
class Plot:
    """One chart with what is written around it."""

    name: str
    """For file names: letters, digits and hyphens."""
    title: str
    caption: str
    chart: alt.LayerChart
    arm: str | None = None
    """The arm that this chart is about, where it is about one only."""
    half: bool = False
    """Whether half the width of a page is enough."""


@dataclass(frozen=True)
class ChartContext:
    """What all charts of a comparison share."""

    comparison: Comparison
    summary: Summary
    names: Sequence[str]
    """Of all arms, in the order of their colors; other comparisons may have brought some of them in."""
    legends: bool
    """Whether a chart says itself which color is which arm."""

    def order(self) -> list[str]:
        """Return the arms of this comparison from top to bottom."""
        return [arm.name for arm in self.comparison.arms]

    def called(self, arm: str) -> str:
        """Return the arm's name as a chart shows it, with a word at the reference."""
        return f"{arm} (reference)" if arm == self.comparison.reference else arm

    def color(self) -> alt.Color:
        """Return the encoding that gives every arm its color."""
        legend = alt.Legend(values=self.order(), title=None, columns=3) if self.legends else None
        return alt.Color("arm:N", scale=alt.Scale(domain=list(self.names)), legend=legend)

    def shape(self) -> alt.Shape:
        """Return the encoding that gives every arm its shape."""
        legend = alt.Legend(values=self.order(), title=None, columns=3) if self.legends else None
        return alt.Shape("arm:N", scale=alt.Scale(domain=list(self.names)), legend=legend)

    def finished(self, arm: Arm) -> list[Run]:
        """Return the runs of `arm` that have an accuracy."""
        return [run for run in arm.runs if run.state == "finished" and run.accuracy is not None]

    def base(self, rows: list[dict[str, Any]]) -> alt.Chart:
        """Return a chart of `rows` without a mark, filtered by the arms that are shown."""
        return chart_of(rows).transform_filter(_IS_SHOWN)

    def layered(self, *layers: alt.Chart, height: float, description: str) -> alt.LayerChart:
        """Return the layers as one chart with the parameter `shown`."""
        shown = alt.param(name=SHOWN, value=self.order())
        layered = alt.layer(*layers).properties(height=height, description=description).add_params(shown)
        assert isinstance(layered, alt.LayerChart)
        return layered


def percent(**fields: str) -> list[alt.Tooltip]:
    """Return tooltips that show these fields as percentages under the given titles."""
    return [alt.Tooltip(f"{name}:Q", title=title, format=".1%") for name, title in fields.items()]


def close_scale() -> alt.Scale:
    """Return a scale that begins where the values do."""
    return alt.Scale(zero=False, nice=True, padding=12)


def percent_axis() -> alt.Axis:
    """Return an axis for shares with labels such as "62.5 %"."""
    return alt.Axis(labelExpr="format(100 * datum.value, '.4~r') + ' %'", tickCount=6)


def interval(row: ArmStatistics) -> dict[str, float]:
    """Return the ends of an arm's interval within what an accuracy can be; both are the mean where there is none."""
    low, high = row.interval or (row.mean, row.mean)
    return {"low": max(0.0, low), "high": min(1.0, high)}
