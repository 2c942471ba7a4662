"""What a run leaves to read: metrics, environment, loss curve."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loraplex.plots import LIGHT, chart_of, save_picture, smoothed

PACKAGES = ("loraplex", "torch", "peft", "transformers", "trl", "accelerate", "datasets", "safetensors", "tokenizers")
# Share of the course over which its values are averaged.
_SMOOTHING = 1 / 20


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
    """Draw the loss curve: every entry faintly, their smoothed course boldly; in nats per `learned` thing.

    Losses that are not finite are left out: a chart has no place for them.
    """
    import altair as alt

    losses = [entry for entry in losses if math.isfinite(entry["loss"])]
    validation = [entry for entry in validation if math.isfinite(entry["loss"])]
    course = smoothed([entry["loss"] for entry in losses], max(1.0, _SMOOTHING * len(losses)))
    rows: dict[str, list[dict[str, Any]]] = {
        "loss": [{"step": entry["step"], "loss": entry["loss"]} for entry in losses],
        "smoothed": [{"step": entry["step"], "loss": mean} for entry, mean in zip(losses, course, strict=True)],
        "validation": [{"step": entry["step"], "loss": entry["loss"]} for entry in validation],
    }
    colors = dict(zip(rows, (LIGHT.faint, LIGHT.arms[0], LIGHT.arms[1]), strict=True))
    shown = [what for what in rows if rows[what]]
    scale = alt.Scale(domain=shown, range=[colors[what] for what in shown])
    lines = []
    for what in shown:
        point = alt.OverlayMarkDef(size=36) if what == "validation" else False
        line = chart_of([{**row, "what": what} for row in rows[what]])
        line = line.mark_line(strokeWidth=1 if what == "loss" else 2.2, point=point)
        lines.append(
            line.encode(
                x=alt.X("step:Q", title="optimizer step", scale=alt.Scale(nice=False), axis=alt.Axis(tickMinStep=1)),
                y=alt.Y("loss:Q", title=f"loss (nats per {learned})", scale=alt.Scale(zero=True)),
                color=alt.Color("what:N", scale=scale, legend=alt.Legend(title=None)),
            )
        )
    save_picture(path, alt.layer(*lines).properties(width=600, height=320), title, subtitle)
