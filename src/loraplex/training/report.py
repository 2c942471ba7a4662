"""What a run leaves to read: metrics, environment, loss curve."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("loraplex", "torch", "peft", "transformers", "trl", "accelerate", "datasets", "safetensors", "tokenizers")
INK, GRID, CURVE, FAINT, ACCENT = "#22303c", "#e3e8ec", "#1f6feb", "#a9c7f7", "#d1495b"


def environment() -> dict[str, Any]:
    """Return the versions and the kind of machine that a result depends on; no names of hosts, users or folders."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "packages": versions,
    }


def split_history(history: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the loss history and the validation history out of a trainer's log history.

    The parts that an objective logs, OBJECTIVE/PART, stay with the loss.
    """
    wanted = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "gradient_norm"}
    losses = [
        {
            "step": entry["step"],
            **{name: entry[key] for key, name in wanted.items() if key in entry},
            **{key: value for key, value in entry.items() if "/" in key},
        }
        for entry in history
        if "loss" in entry
    ]
    validation = [{"step": entry["step"], "loss": entry["eval_loss"]} for entry in history if "eval_loss" in entry]
    return losses, validation


def draw_loss(
    path: Path,
    losses: Sequence[dict[str, Any]],
    validation: Sequence[dict[str, Any]],
    title: str,
    subtitle: str,
    learned: str = "token",
) -> None:
    """Write the loss curve as a PNG: every entry faintly, their smoothed course boldly; in nats per `learned` thing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, values = [entry["step"] for entry in losses], [entry["loss"] for entry in losses]
    smooth = smoothed(values)
    axes.plot(steps, values, color=FAINT, linewidth=1, label="loss")
    axes.plot(steps, smooth, color=CURVE, linewidth=2.2, label="smoothed")
    if validation:
        points = [entry["step"] for entry in validation], [entry["loss"] for entry in validation]
        axes.plot(*points, color=ACCENT, linewidth=1.4, marker="o", markersize=4, label="validation")
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_ylabel(f"loss (nats per {learned})", color=INK)
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=22)
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, color=INK, fontsize=9)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=INK, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.legend(frameon=False, labelcolor=INK)
    figure.savefig(path)


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean of the neighbors of every value, weighted by exp(−d²/2w²) at distance d, w = 1/20 of them all."""
    width = max(1.0, len(values) / 20)
    means = []
    for center in range(len(values)):
        weights = [math.exp(-(((index - center) / width) ** 2) / 2) for index in range(len(values))]
        means.append(sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights))
    return means
