"""Pictures of groups and maps: one look for all, in colors that color-blind readers tell apart, and with shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from loraplex.analysis.clustering import MOST_IN_TREE, Grouping, tree
from loraplex.comparison.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One fewer than the colors: color and shape together tell 42 apart.
SHAPES = ("o", "s", "D", "^", "P", "v")
# Rows on a map: more lie on top of each other, and take long.
MOST_ON_MAP = 2_000
# Merges of the tree that are drawn, the last ones.
MOST_LEAVES = 30
_LEGEND_ROWS = 14

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
    folder.mkdir(parents=True, exist_ok=True)
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
    figure = blank(9.6, 4.0)
    numbers = [partition.groups for partition in grouping.partitions]
    panels = (
        ("inertia", [partition.inertia for partition in grouping.partitions], grouping.elbow, "elbow"),
        ("silhouette", [partition.silhouette for partition in grouping.partitions], grouping.best_silhouette, "best"),
    )
    for place, (name, values, chosen, word) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, place)
        axes.plot(numbers, values, color=LIGHT.arms[0], marker="o", markersize=4, linewidth=1.8)
        axes.axvline(grouping.number, color=LIGHT.front, linewidth=1.2, linestyle="--", zorder=0)
        if chosen in numbers:
            value = values[numbers.index(chosen)]
            axes.plot([chosen], [value], marker="o", markersize=10, color=LIGHT.arms[1], linestyle="none")
            at_the_end = chosen > (numbers[0] + numbers[-1]) / 2
            axes.annotate(
                f"{word}: {chosen}",
                (chosen, value),
                xytext=(-9 if at_the_end else 9, 9),
                textcoords="offset points",
                ha="right" if at_the_end else "left",
                color=LIGHT.ink,
            )
        label_axes(axes, "groups", name)
        axes.set_xticks(numbers)
        axes.margins(y=0.15)
    save(figure, path, title, f"{grouping.method}, {len(grouping.points):,} texts; suggested: {grouping.number}")


def draw_tree(path: Path, grouping: Grouping, title: str) -> None:
    """Draw the last merges of Ward's tree and where it is cut for the suggested number."""
    from scipy.cluster.hierarchy import dendrogram  # type: ignore[import-untyped]

    rows = _some(len(grouping.points), min(MOST_IN_TREE, MOST_ON_MAP))
    merges = tree(grouping.points.points[rows])
    figure = blank(9.6, 4.6)
    axes = figure.add_subplot()
    leaves = min(MOST_LEAVES, len(rows))
    dendrogram(
        merges,
        p=leaves,
        truncate_mode="lastp",
        ax=axes,
        link_color_func=lambda _: LIGHT.arms[0],
        leaf_rotation=90,
        leaf_font_size=9,
    )
    # between the merge that would leave one group fewer and the one before it
    cut = float(merges[-grouping.number, 2] + merges[1 - grouping.number, 2]) / 2
    axes.axhline(cut, color=LIGHT.arms[1], linewidth=1.5, linestyle="--")
    axes.annotate(
        f"{grouping.number} groups",
        (1, cut),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color=LIGHT.ink,
    )
    label_axes(axes, "texts in a branch (in brackets), or the number of a single text", "height of a merge")
    axes.grid(axis="x", visible=False)
    save(figure, path, title, f"Ward's tree of {len(rows):,} texts, its last {leaves - 1} merges")


def draw_map(path: Path, grouping: Grouping, tasks: Sequence[str], title: str) -> None:
    """Draw the t-SNE map, colored by group and, where the rows have tasks, by task."""
    rows = _some(len(grouping.points), MOST_ON_MAP)
    places = t_sne(grouping.points.points[rows])
    words = {label: ", ".join(group.words[:2]) for label, group in enumerate(grouping.groups)}
    groups = [f"{label + 1}: {words[label]}" if label >= 0 else "noise" for label in grouping.labels[rows].tolist()]
    own = [tasks[index] for index in grouping.points.rows[rows].tolist()]
    panels = [("by group", groups)]
    if len(set(own)) > 1:
        panels.append(("by task", own))
    most = max(len(set(labels)) for _, labels in panels)
    figure = blank(6.4 * len(panels), 6.0 + 0.2 * legend_rows(most))
    for place, (name, labels) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        draw_points(axes, places, labels)
        label_map(axes)
        axes.set_title(name, loc="left", fontsize=11, color=LIGHT.ink)
        add_legend(axes)
    save(figure, path, title, f"t-SNE of {len(rows):,} texts; distances between far groups mean nothing")


def draw_points(axes: Axes, places: Array, labels: Sequence[str], shapes: Sequence[str] | None = None) -> None:
    """Draw points (n, 2) with a color for every label, and a shape for it too unless `shapes` (n,) says which."""
    names = sorted(set(labels), key=_natural)
    for rank, name in enumerate(names):
        chosen = [index for index, label in enumerate(labels) if label == name]
        for shape in dict.fromkeys([SHAPES[rank % len(SHAPES)]] if shapes is None else [shapes[i] for i in chosen]):
            at = [index for index in chosen if shapes is None or shapes[index] == shape]
            axes.scatter(
                places[at, 0],
                places[at, 1],
                s=16,
                marker=shape,
                color=LIGHT.front if name == "noise" else LIGHT.arms[rank % len(LIGHT.arms)],
                edgecolors=LIGHT.background,
                linewidths=0.3,
                label=name if at[0] == chosen[0] else None,
            )


def label_map(axes: Axes) -> None:
    """Name the axes of a map; their numbers mean nothing and are left out."""
    label_axes(axes, "t-SNE 1", "t-SNE 2")
    axes.tick_params(labelbottom=False, labelleft=False)


def legend_rows(labels: int) -> int:
    """Return the rows of a legend with this many labels."""
    return -(-labels // _legend_columns(labels))


def add_legend(axes: Axes) -> None:
    """Put a legend under the axes, in as many columns as it needs."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0, -0.07),
        ncols=_legend_columns(len(labels)),
        fontsize=8.5,
        frameon=False,
        labelcolor=LIGHT.ink,
        markerscale=1.6,
        handletextpad=0.3,
    )


def _legend_columns(labels: int) -> int:
    return max(2, -(-labels // _LEGEND_ROWS))


def blank(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches, drawn without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=LIGHT.background)
    FigureCanvasAgg(figure)
    return figure


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Name the axes and give them the look of all pictures."""
    axes.set_xlabel(x, color=LIGHT.muted)
    axes.set_ylabel(y, color=LIGHT.muted)
    axes.tick_params(colors=LIGHT.muted, length=0)
    axes.grid(color=LIGHT.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def save(figure: Figure, path: Path, title: str, subtitle: str) -> None:
    """Write the figure under its title, as the kind of picture that the ending of `path` says."""
    # as one text with two sizes, constrained layout would not keep room for the second
    figure.suptitle(f"{title}\n{subtitle}", x=0.01, ha="left", fontsize=11, color=LIGHT.ink)
    figure.savefig(path)


def _some(count: int, most: int) -> npt.NDArray[np.int64]:
    """Return the indices of at most `most` of `count` rows, the same ones every time."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


def _natural(name: str) -> tuple[bool, int, str]:
    number = name.partition(":")[0]
    return (name == "noise", int(number) if number.isdigit() else 0, name)
