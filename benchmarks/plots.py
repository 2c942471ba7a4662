"""The plots of docs/performance.md, each as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_OURS, _PEER, _LIMIT = "#1f6f8b", "#c8c8c8", "#99a8b2"
_SHORT = {
    "ours": "loraplex",
    "ours-lora": "loraplex LoRA",
    "ours-mlp": "loraplex, MLP",
    "ours-lora-mlp": "loraplex LoRA, MLP",
    "ours-bare": "loraplex, no trainer",
    "echo-never": "echo, p = 0",
    "echo-always": "echo, p = 1",
    "echo-full": "echo, p = 1, in full",
    "peft-best": "PEFT best",
    "peft-padded": "PEFT padded",
    "peft-shipped": "PEFT shipped",
    "limit": "limit",
    "lm-eval-default": "lm-eval, batch 1",
    "lm-eval-best": "lm-eval, best batch",
}

Result = dict[str, Any]


def draw(found: dict[str, Result], folder: Path) -> None:
    """Draw every plot whose result is there."""
    folder.mkdir(parents=True, exist_ok=True)
    # Text stays text, and the same result gives the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "loraplex", "font.size": 9})
    for name, result in found.items():
        if name in _DRAWN:
            figure = _DRAWN[name](result)
            figure.savefig(folder / f"{name}.png", dpi=150)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def _contest(result: Result) -> Figure:
    """Rate and peak memory of every contestant."""
    figure = Figure(figsize=(8, 0.4 * len(result["contestants"]) + 1), layout="constrained")
    rates, peaks = figure.subplots(1, 2, sharey=True)
    contestants = result["contestants"]
    names = sorted(contestants, key=lambda name: contestants[name]["rate"])
    _bars(rates, names, [contestants[name]["rate"] for name in names], f"{result['unit']} per second")
    _bars(peaks, names, [contestants[name]["peak_bytes"] / 1e9 for name in names], "peak memory, GB")
    return figure


def _bars(axes: Axes, names: list[str], values: list[float], title: str) -> None:
    colors = [_LIMIT if name == "limit" else _OURS if name.startswith("ours") else _PEER for name in names]
    bars = axes.barh([_SHORT.get(name, name) for name in names], values, color=colors)
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=2)
    axes.set_title(title)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _layers(result: Result) -> Figure:
    """How many times faster than PEFT's every layer is, with the interval."""
    layers = result["layers"][::-1]
    figure = Figure(figsize=(7, 0.25 * len(layers) + 1), layout="constrained")
    axes = figure.subplots()
    names = [
        f"{layer['adapter']} {layer['dtype']} {layer['in_features']}×{layer['out_features']}, {layer['tokens']} tokens"
        for layer in layers
    ]
    medians = [layer["median"] for layer in layers]
    below = [layer["median"] - layer["low"] for layer in layers]
    above = [layer["high"] - layer["median"] for layer in layers]
    colors = [_OURS if layer["adapter"] == "dora" else "#6fb1c7" for layer in layers]
    axes.barh(names, medians, xerr=[below, above], color=colors, ecolor="#444444", capsize=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_title("speed over PEFT's layer, forward and backward")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _growth(result: Result) -> Figure:
    """Rate above, peak memory below, against rank, length and sites."""
    axes_names = list(dict.fromkeys(point["axis"] for point in result["points"]))
    figure = Figure(figsize=(9, 5), layout="constrained")
    grid = figure.subplots(2, len(axes_names), squeeze=False)
    for column, axis in enumerate(axes_names):
        points = [point for point in result["points"] if point["axis"] == axis]
        values = [point["value"] for point in points]
        for name, color in (("ours", _OURS), ("peft-best", "#888888")):
            sides = [point["contestants"][name] for point in points]
            rows = ([side["rate"] for side in sides], [side["peak_bytes"] / 1e9 for side in sides])
            for axes, series in zip(grid[:, column], rows, strict=True):
                axes.plot(values, series, marker="o", color=color, label=_SHORT[name])
        for axes, title in zip(grid[:, column], ("real tokens per second", "peak memory, GB"), strict=True):
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, [str(value) for value in values])
            axes.set_ylim(0, 1.08 * max(max(line.get_ydata()) for line in axes.lines))
            axes.set_xlabel(axis)
            axes.set_title(title)
            axes.spines[["top", "right"]].set_visible(False)
    # between the two curves
    grid[0, 0].legend(frameon=False, loc="center", bbox_to_anchor=(0.55, 0.38))
    return figure


_DRAWN: dict[str, Callable[[Result], Figure]] = {
    "training-lora": _contest,
    "training-dora": _contest,
    "training-pair": _contest,
    "training-compact": _contest,
    "training-hydra": _contest,
    "training-echo": _contest,
    "evaluation": _contest,
    "layers": _layers,
    "growth": _growth,
}
