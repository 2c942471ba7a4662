"""Rank maps: ranks by layer and kind of site, of one plan or as the mean of several runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from loraplex.allocation.sites import Site
from loraplex.plots import LIGHT, chart_of, save_picture

if TYPE_CHECKING:
    import altair as alt

OUTSIDE = "–"
"""The layer of sites outside the layers, such as an embedding."""
_CELL = 24


class RankCell(NamedTuple):
    """One place of a rank map."""

    layer: str
    kind: str
    rank: float


def rank_cells(ranks: Sequence[Mapping[str, int]]) -> list[RankCell]:
    """Return a cell per site with the mean of its ranks over the runs, by layer and then in the order of the model."""
    of_site: dict[str, list[int]] = {}
    for of_run in ranks:
        for name, rank in of_run.items():
            of_site.setdefault(name, []).append(rank)
    sites = [Site(name, 0, 0, bias=False) for name in of_site]
    places = Counter((site.layer, site.kind) for site in sites)
    cells = []
    for site in sites:
        layer = OUTSIDE if site.layer is None else str(site.layer)
        # Several of one kind in a layer, as the experts of a mixture are: their whole paths tell them apart.
        alone = places[site.layer, site.kind] == 1
        kind = site.kind if alone else site.name.partition(f".{layer}.")[2] or site.name
        cells.append(RankCell(layer, kind, fmean(of_site[site.name])))
    return sorted(cells, key=lambda cell: math.inf if cell.layer == OUTSIDE else int(cell.layer))


def rank_heat(base: alt.Chart, cells: Sequence[RankCell], highest: float) -> alt.Chart:
    """Return a heat map with a row per kind of site and a column per layer; `base` holds the cells as its rows."""
    import altair as alt

    layers, kinds = (list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("layer", "kind"))
    legend = alt.Legend(title="rank", orient="top", gradientLength=160, gradientThickness=10, tickMinStep=1)
    tooltip = [alt.Tooltip(f"{key}:N") for key in ("layer", "kind")] + [alt.Tooltip("rank:Q", format=".3~r")]
    heat = base.mark_rect(stroke=None).encode(
        x=alt.X("layer:O", sort=layers, title="layer", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("kind:N", sort=kinds, title=None, axis=alt.Axis(labelLimit=150)),
        color=alt.Color("rank:Q", scale=alt.Scale(domain=[0, highest]), legend=legend),
        tooltip=tooltip,
    )
    assert isinstance(heat, alt.Chart)
    return heat


def height(cells: Sequence[RankCell]) -> int:
    """Return the height of a rank map in pixels."""
    return _CELL * len({cell.kind for cell in cells})


def draw_ranks(path: Path, ranks: Mapping[str, int], title: str, subtitle: str = "") -> None:
    """Draw the ranks of a plan: a row per kind of site, a column per layer, in every cell the rank.

    Closed sites have no number. Sites outside the layers get a column of their own on the right.
    """
    import altair as alt

    cells = rank_cells([ranks])
    highest = max(ranks.values(), default=1)
    base = chart_of([cell._asdict() for cell in cells])
    heat = rank_heat(base, cells, highest)
    dark = f"datum.rank > {highest / 2}"
    numbers = (
        base.transform_filter("datum.rank > 0")
        .mark_text(fontSize=10)
        .encode(
            x=heat.encoding.x,
            y=heat.encoding.y,
            text=alt.Text("rank:Q", format="d"),
            color=alt.condition(dark, alt.value(LIGHT.background), alt.value(LIGHT.ink)),
        )
    )
    columns = len({cell.layer for cell in cells})
    # Room for the title, however few layers there are.
    chart = alt.layer(heat, numbers).properties(width=max(420, _CELL * columns), height=height(cells))
    save_picture(path, chart, title, subtitle)
