"""Pictures of groups and maps, in colors that color-blind readers tell apart, and with shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from loraplex.data.clustering import MOST_IN_TREE, Grouping, tree
from loraplex.plots import LIGHT, SHAPES, chart_of, save_picture

if TYPE_CHECKING:
    import altair as alt

# Rows on a map: more lie on top of each other, and take long.
MOST_ON_MAP = 2_000
# Merges of the tree that are drawn, the last ones.
MOST_LEAVES = 30
NOISE = "noise"
_LEGEND_ROWS = 14
_TREE, _LETTER = 300, 7
"""Pixels of a tree's height, and of a letter."""
_MAP = 400
"""Pixels of a map's side."""

Array = npt.NDArray[np.float64]


def t_sne(vectors: Array) -> Array:
    """Return the t-SNE map (n, 2) of vectors (n, d), with the settings of HydraLoRA's own script.

    That is `TSNE(n_components=2, init="pca", random_state=42)`; the perplexity, 30 there, is at most (n − 1) / 3.
    """
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(vectors) - 1) / 3)
    places: Array = TSNE(n_components=2, init="pca", random_state=42, perplexity=perplexity).fit_transform(vectors)
    return places


def draw_grouping(folder: Path, grouping: Grouping, tasks: Sequence[str], title: str) -> list[Path]:
    """Draw the curve, Ward's tree and the map into `folder`; `tasks` are those of all texts, "" where they have none.

    Returns the files.
    """
    files = [folder / "curve.png", folder / "tree.png", folder / "map.png"]
    if len(grouping.partitions) > 1:
        draw_curve(files[0], grouping, title)
    else:
        del files[0]
    draw_tree(folder / "tree.png", grouping, title)
    draw_map(folder / "map.png", grouping, tasks, title)
    return files


def draw_curve(path: Path, grouping: Grouping, title: str) -> None:
    """Draw inertia and silhouette over the number of groups; the suggestion is marked."""
    import altair as alt

    panels = (
        ("inertia", grouping.elbow, "elbow"),
        ("silhouette", grouping.best_silhouette, "best"),
    )
    charts = []
    for name, chosen, word in panels:
        rows = [{"groups": found.groups, name: getattr(found, name)} for found in grouping.partitions]
        marked = [{**row, "word": f"{word}: {chosen}"} for row in rows if row["groups"] == chosen]
        x = alt.X(
            "groups:Q",
            title="groups",
            axis=alt.Axis(tickMinStep=1, format="d"),
            scale=alt.Scale(zero=False, padding=24),
        )
        y = alt.Y(f"{name}:Q", title=name, scale=alt.Scale(zero=False, padding=24))
        point = alt.OverlayMarkDef(size=36, color=LIGHT.arms[0])
        charts.append(
            alt.layer(
                chart_of([{"groups": grouping.number}]).mark_rule(style="front").encode(x=x),
                chart_of(rows).mark_line(color=LIGHT.arms[0], point=point, strokeWidth=2).encode(x=x, y=y),
                chart_of(marked).mark_point(size=160, filled=True, opacity=1, color=LIGHT.arms[1]).encode(x=x, y=y),
                chart_of(marked).mark_text(align="left", dx=9, dy=-9, style="label").encode(x=x, y=y, text="word:N"),
            ).properties(width=340, height=240)
        )
    subtitle = f"{grouping.method}, {len(grouping.points):,} texts; suggested: {grouping.number}"
    save_picture(path, alt.hconcat(*charts, spacing=36), title, subtitle)


def draw_tree(path: Path, grouping: Grouping, title: str) -> None:
    """Draw the last merges of Ward's tree and where it is cut for the suggested number."""
    import altair as alt
    from scipy.cluster.hierarchy import dendrogram  # type: ignore[import-untyped]

    rows = _some(len(grouping.points), min(MOST_IN_TREE, MOST_ON_MAP))
    merges = tree(grouping.points.points[rows])
    leaves = min(MOST_LEAVES, len(rows))
    drawn = dendrogram(merges, p=leaves, truncate_mode="lastp", no_plot=True)
    corners = [
        {"merge": merge, "corner": corner, "place": place, "height": height}
        for merge, (places, heights) in enumerate(zip(drawn["icoord"], drawn["dcoord"], strict=True))
        for corner, (place, height) in enumerate(zip(places, heights, strict=True))
    ]
    # scipy puts the leaves at 5, 15, 25 …
    names = [{"place": 5 + 10 * leaf, "name": name} for leaf, name in enumerate(drawn["ivl"])]
    x = alt.X(
        "place:Q",
        title="texts in a branch (in brackets), or the number of a single text",
        axis=alt.Axis(labels=False, grid=False, titlePadding=10 + _LETTER * max(len(name) for name in drawn["ivl"])),
        scale=alt.Scale(domain=[0, 10 * len(names)], nice=False),
    )
    # Between the merge that would leave one group fewer and the one before it.
    cut = float(merges[-grouping.number, 2] + merges[1 - grouping.number, 2]) / 2
    at_cut = chart_of([{"height": cut, "place": 10 * len(names), "text": f"{grouping.number} groups"}])
    y = alt.Y("height:Q", title="height of a merge")
    chart = alt.layer(
        chart_of(corners)
        .mark_line(color=LIGHT.arms[0], strokeWidth=1.5)
        .encode(x=x, y=y, detail="merge:N", order="corner:Q"),
        at_cut.mark_rule(color=LIGHT.arms[1], strokeWidth=1.5, strokeDash=[5, 4]).encode(y=y),
        at_cut.mark_text(align="right", dx=-4, dy=-8, style="label").encode(x=x, y=y, text="text:N"),
        chart_of(names)
        .mark_text(angle=270, align="right", style="number")
        .encode(x=x, y=alt.value(_TREE + 8), text="name:N"),
    ).properties(width=720, height=_TREE)
    save_picture(path, chart, title, f"Ward's tree of {len(rows):,} texts, its last {leaves - 1} merges")


def draw_map(path: Path, grouping: Grouping, tasks: Sequence[str], title: str) -> None:
    """Draw the t-SNE map, colored by group and, where the rows have tasks, by task."""
    rows = _some(len(grouping.points), MOST_ON_MAP)
    places = t_sne(grouping.points.points[rows])
    words = {label: ", ".join(group.words[:2]) for label, group in enumerate(grouping.groups)}
    groups = [f"{label + 1}: {words[label]}" if label >= 0 else NOISE for label in grouping.labels[rows].tolist()]
    own = [tasks[index] for index in grouping.points.rows[rows].tolist()]
    panels = {"by group": map_of(places, groups, "by group")}
    if len(set(own)) > 1:
        panels["by task"] = map_of(places, own, "by task")
    subtitle = f"t-SNE of {len(rows):,} texts; distances between far groups mean nothing"
    save_picture(path, side_by_side(panels), title, subtitle)


def map_of(places: Array, labels: Sequence[str], title: str, shapes: Mapping[str, Sequence[str]] | None = None) -> Any:
    """Return a chart of points (n, 2) with a color for every label, and a shape for it too.

    `shapes` gives what shapes stand for instead: under a heading, one value a point. The numbers on the axes of a map
    mean nothing and are left out.
    """
    import altair as alt

    names = sorted(set(labels), key=_natural)
    columns = max(2, -(-len(names) // _LEGEND_ROWS))
    colors = [LIGHT.front if name == NOISE else LIGHT.arms[place % len(LIGHT.arms)] for place, name in enumerate(names)]
    forms = [SHAPES[place % len(SHAPES)] for place in range(len(names))]
    rows = [{"x": float(x), "y": float(y), "label": label} for (x, y), label in zip(places, labels, strict=True)]
    legend = alt.Legend(title=None, columns=columns)
    shape = alt.Shape("label:N", scale=alt.Scale(domain=names, range=forms), legend=legend)
    for heading, values in (shapes or {}).items():
        rows = [{**row, "shape": value} for row, value in zip(rows, values, strict=True)]
        kinds = alt.Scale(domain=sorted(set(values)), range=["circle", "triangle-up"])
        shape = alt.Shape("shape:N", scale=kinds, legend=alt.Legend(title=heading))
    axis = alt.Axis(labels=False)
    return (
        chart_of(rows)
        .mark_point(size=26, filled=True, opacity=0.9, stroke=LIGHT.background, strokeWidth=0.3)
        .encode(
            x=alt.X("x:Q", title="t-SNE 1", axis=axis, scale=alt.Scale(zero=False, padding=12)),
            y=alt.Y("y:Q", title="t-SNE 2", axis=axis, scale=alt.Scale(zero=False, padding=12)),
            color=alt.Color("label:N", scale=alt.Scale(domain=names, range=colors), legend=legend),
            shape=shape,
        )
        .properties(width=_MAP, height=_MAP, title=alt.TitleParams(title, fontSize=12, offset=10))
    )


def side_by_side(panels: Mapping[str, Any]) -> alt.HConcatChart:
    """Return maps beside each other, each with legends of its own."""
    import altair as alt

    chart = alt.hconcat(*panels.values(), spacing=36).resolve_scale(color="independent", shape="independent")
    assert isinstance(chart, alt.HConcatChart)
    return chart


def _some(count: int, most: int) -> npt.NDArray[np.int64]:
    """Return the indices of at most `most` of `count` rows, the same ones every time."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


def _natural(name: str) -> tuple[bool, int, str]:
    number = name.partition(":")[0]
    return (name == NOISE, int(number) if number.isdigit() else 0, name)
