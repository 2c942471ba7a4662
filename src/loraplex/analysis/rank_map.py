"""The picture of a plan: ranks by layer and kind of module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loraplex.allocation.sites import Site

INK = "#22303c"


def draw_ranks(path: Path, ranks: Mapping[str, int], title: str, subtitle: str = "") -> None:
    """Write a heat map as PNG: a row per kind of module, a column per layer, in every cell the rank; 0 stays empty.

    Sites outside the layers get columns of their own on the right.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sites = [Site(name, 0, 0, bias=False) for name in ranks]
    kinds = list(dict.fromkeys(site.kind for site in sites))
    layers: list[int | None] = [*sorted({site.layer for site in sites if site.layer is not None})]
    if any(site.layer is None for site in sites):
        layers.append(None)
    cells = [[float("nan")] * len(layers) for _ in kinds]
    for site in sites:
        cells[kinds.index(site.kind)][layers.index(site.layer)] = ranks[site.name] or float("nan")
    figure = Figure(figsize=(max(5.0, 0.3 * len(layers) + 2.4), 0.36 * len(kinds) + 1.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    most = max(ranks.values(), default=1)
    axes.set_facecolor("#f3f4f5")
    axes.imshow(cells, cmap="Blues", vmin=-0.25 * most, vmax=most, aspect="auto")
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            if value == value:
                color = "black" if value < 0.5 * most else "white"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=color)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    every = max(1, len(layers) // 16)
    shown = range(0, len(layers), every)
    axes.set_xticks(shown, ["–" if layers[index] is None else str(layers[index]) for index in shown], fontsize=8)
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    axes.set_title(subtitle, loc="left", fontsize=8, color=INK)
    figure.savefig(path)
