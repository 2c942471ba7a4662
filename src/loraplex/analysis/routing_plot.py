"""The picture of a run's routing: entropy and dead heads over training, and a heat map of heads × tasks by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraplex.training.report import ACCENT, CURVE, GRID, INK

_MOST_ROWS = 240


def draw_routing(path: Path, routing: Mapping[str, Any], title: str) -> None:
    """Write the picture as a PNG.

    `routing` has "tasks": {task: {site: {"load": [mean gate of every head]}}} and, of a run, "over_training":
    [{"step", "entropy", "dead_heads"}]. Colors are centered on an even gate, 1/heads.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    course: Sequence[Mapping[str, Any]] = routing.get("over_training") or []
    tasks: Mapping[str, Any] = routing["tasks"]
    sites = list(next(iter(tasks.values())))[:_MOST_ROWS] if tasks else []
    tall = max(2.6, 0.055 * len(sites) + 1.2)
    ratios = [2.6] * bool(course) + [tall] * bool(sites)
    figure = Figure(figsize=(8.4, sum(ratios) + 0.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12, fontweight="bold")
    panels: Any = figure.subplots(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0] if ratios else []
    if course:
        _draw_course(panels[0], course)
    if sites:
        _draw_heads(figure, panels[-1], tasks, sites)
    figure.savefig(path)


def _draw_course(axes: Any, course: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    steps = [entry["step"] for entry in course]
    axes.plot(steps, [entry["entropy"] for entry in course], color=CURVE, linewidth=2, label="entropy / log(heads)")
    axes.plot(steps, [entry["dead_heads"] for entry in course], color=ACCENT, linewidth=2, label="dead heads")
    axes.set_ylim(-0.03, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_title("mean over the sites, all training rows", loc="left", color=INK, fontsize=9)
    axes.grid(axis="y", color=GRID)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=INK, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, labelcolor=INK, loc="lower right", bbox_to_anchor=(1, 0.97), ncols=2)


def _draw_heads(figure: Any, axes: Any, tasks: Mapping[str, Any], sites: Sequence[str]) -> None:
    """Draw a row per site, and per task a block of columns, one for every head."""
    import numpy as np
    from matplotlib.colors import TwoSlopeNorm

    # grouped by kind, so that the blocks of a model stand in their order below each other
    sites = sorted(sites, key=lambda site: site.rpartition(".")[2])
    heads = len(next(iter(next(iter(tasks.values())).values()))["load"])
    grid = np.array([[gate for loads in tasks.values() for gate in loads[site]["load"]] for site in sites])
    even = 1 / heads
    most = max(float(grid.max()), even * 1.01)
    norm = TwoSlopeNorm(even, 0.0, most)
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="RdBu_r", norm=norm)
    for border in range(1, len(tasks)):
        axes.axvline(border * heads - 0.5, color="white", linewidth=4)
    kinds = [site.rpartition(".")[2] for site in sites]
    starts = [row for row, kind in enumerate(kinds) if row == 0 or kinds[row - 1] != kind]
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=3)
    ends = [*starts[1:], len(sites)]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    axes.set_yticks(middles, [kinds[start] for start in starts], color=INK)
    axes.set_ylabel("sites by kind, first layer on top", color=INK)
    labels = [task or "all rows" for task in tasks]
    turned = 35 if max(map(len, labels)) * len(labels) > 60 else 0
    places = [heads * index + (heads - 1) / 2 for index in range(len(labels))]
    axes.set_xticks(places, labels, color=INK, rotation=turned, ha="right" if turned else "center")
    axes.set_title(f"mean gate of each of the {heads} heads, task by task", loc="left", color=INK, fontsize=9)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, ticks=[0, even, most], fraction=0.05, pad=0.02)
    bar.ax.set_yticklabels(["0", f"even, {even:.2g}", f"{most:.2g}"], color=INK)
    bar.outline.set_visible(False)
