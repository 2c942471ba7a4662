"""The picture of a run's routing: entropy and dead heads over training, and a heat map of heads × tasks by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraplex.allocation.sites import kind_of
from loraplex.plots import LIGHT, chart_of, save_picture

_MOST_ROWS = 240
_ROW, _HEAD = 5, 18
"""Pixels of a site and of a head."""
_LETTER = 7
_WIDTH = 560
_ENTROPY, _DEAD = "entropy / log(heads)", "dead heads"


def draw_routing(path: Path, routing: Mapping[str, Any], title: str) -> None:
    """Write the picture as the kind of file that the ending of `path` says.

    `routing` has "tasks": {task: {site: {"load": [mean gate of every head]}}} and, of a run, "over_training":
    [{"step", "entropy", "dead_heads"}]. Colors are centered on an even gate, 1/heads.
    """
    import altair as alt

    course: Sequence[Mapping[str, Any]] = routing.get("over_training") or []
    tasks: Mapping[str, Any] = routing["tasks"]
    charts: list[Any] = []
    if course:
        charts.append(_course(course))
    if tasks and next(iter(tasks.values())):
        charts.append(_heads(tasks))
    chart = alt.vconcat(*charts, spacing=36).resolve_scale(color="independent")
    heads = next((len(load["load"]) for sites in tasks.values() for load in sites.values()), 0)
    subtitle = f"mean gate of each of the {heads} heads, task by task; sites by kind, first layer on top"
    save_picture(path, chart, title, subtitle if heads else "")


def _course(course: Sequence[Mapping[str, Any]]) -> Any:
    import altair as alt

    rows = [
        {"step": entry["step"], "value": entry[key], "what": what}
        for entry in course
        for key, what in (("entropy", _ENTROPY), ("dead_heads", _DEAD))
    ]
    colors = alt.Scale(domain=[_ENTROPY, _DEAD], range=list(LIGHT.arms[:2]))
    return (
        chart_of(rows)
        .mark_line(strokeWidth=2)
        .encode(
            x=alt.X("step:Q", title="optimizer step", scale=alt.Scale(nice=False), axis=alt.Axis(tickMinStep=1)),
            y=alt.Y(
                "value:Q",
                title="mean over the sites, all training rows",
                axis=alt.Axis(format="%", tickCount=5),
                scale=alt.Scale(domain=[0, 1]),
            ),
            color=alt.Color("what:N", scale=colors, legend=alt.Legend(title=None)),
        )
        .properties(width=_WIDTH, height=170)
    )


def _heads(tasks: Mapping[str, Any]) -> Any:
    """Return a block per kind of site and task, in it a row per site and a column per head."""
    import altair as alt

    sites = list(next(iter(tasks.values())))[:_MOST_ROWS]
    names = {task: task or "all rows" for task in tasks}
    # Grouped by kind, the first layer on top.
    kinds = list(dict.fromkeys(sorted(map(kind_of, sites))))
    heads = len(next(iter(next(iter(tasks.values())).values()))["load"])
    rows = [
        {"task": names[task], "kind": kind_of(site), "site": place, "head": head + 1, "gate": round(gate, 4)}
        for task, loads in tasks.items()
        for place, site in enumerate(sites)
        for head, gate in enumerate(loads[site]["load"])
    ]
    even = 1 / heads
    most = max(*(row["gate"] for row in rows), even * 1.01)
    gates = alt.Scale(domain=[0, even, most], range=[LIGHT.gates[0], LIGHT.gates[2], LIGHT.gates[-1]])
    legend = alt.Legend(
        title="gate", orient="right", values=[0, even, most], format=".2f", gradientLength=140, gradientThickness=10
    )
    tall = _ROW * max(sum(kind_of(site) == kind for site in sites) for kind in kinds)
    wide = max(_HEAD * heads, *(_LETTER * len(name) for name in names.values()))
    header: dict[str, Any] = {"title": None, "labelColor": LIGHT.ink, "labelFontSize": 12}
    # Room for the title above a single block.
    wide = max(wide, 240) if len(names) == 1 else wide
    return (
        chart_of(rows)
        .mark_rect(stroke=None)
        .encode(
            x=alt.X("head:O", axis=None),
            y=alt.Y("site:O", axis=None),
            color=alt.Color("gate:Q", scale=gates, legend=legend),
            row=alt.Row("kind:N", sort=kinds, header=alt.Header(**header, labelAngle=0, labelAlign="left"), spacing=5),
            column=alt.Column("task:N", sort=list(names.values()), header=alt.Header(**header), spacing=6),
        )
        .properties(width=wide, height=max(tall, 14))
        .resolve_scale(y="independent")
    )
