"""The plots of docs/performance.md, each as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt

from loraplex.plots import LIGHT, chart_of, save_picture

_OURS, _PEER, _LIMIT, _LABELS = LIGHT.arms[0], "#c9ced4", LIGHT.front, 330
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
Drawn = tuple[alt.TopLevelMixin, str]
"""A chart and what stands under its title."""


def draw(found: dict[str, Result], folder: Path) -> None:
    """Draw every plot whose result is there."""
    for name, result in found.items():
        if name in _DRAWN:
            chart, subtitle = _DRAWN[name](result)
            for form in (".png", ".svg"):
                save_picture(folder / f"{name}{form}", chart, name.replace("-", ", "), subtitle)


def _contest(result: Result) -> Drawn:
    """Rate and peak memory of every contestant."""
    contestants = result["contestants"]
    rows: list[Result] = [
        {
            "name": _SHORT.get(name, name),
            "color": _LIMIT if name == "limit" else _OURS if name.startswith("ours") else _PEER,
            "rate": contestants[name]["rate"],
            "peak": contestants[name]["peak_bytes"] / 1e9,
        }
        for name in sorted(contestants, key=lambda name: -contestants[name]["rate"])
    ]
    rate, peak = f"{result['unit']} per second", "peak memory, GB"
    return alt.hconcat(_bars(rows, "rate", rate), _bars(rows, "peak", peak), spacing=24), ""


def _bars(rows: list[Result], key: str, title: str) -> alt.LayerChart:
    y = alt.Y("name:N", sort=[row["name"] for row in rows], title=None, axis=_names())
    # Room for the number behind the longest bar.
    domain = [0, 1.15 * max(row[key] for row in rows)]
    x = alt.X(f"{key}:Q", title=title, scale=alt.Scale(domain=domain, nice=False))
    base = chart_of(rows).encode(x=x, y=y)
    bars = base.mark_bar().encode(color=alt.Color("color:N", scale=None))
    numbers = base.mark_text(align="left", dx=4, style="number").encode(text=alt.Text(f"{key}:Q", format=",.3~r"))
    return alt.layer(bars, numbers).properties(width=280, height=24 * len(rows))


def _names() -> alt.Axis:
    return alt.Axis(labelLimit=_LABELS, labelOverlap=False, grid=False)


def _layers(result: Result) -> Drawn:
    """How many times faster than PEFT's every layer is, with the interval."""
    rows: list[Result] = [
        {key: layer[key] for key in ("median", "low", "high", "adapter")}
        | {
            "name": f"{layer['adapter']} {layer['dtype']} {layer['in_features']}×{layer['out_features']}, "
            f"{layer['tokens']} tokens"
        }
        for layer in result["layers"]
    ]
    y = alt.Y("name:N", sort=[row["name"] for row in rows], title=None, axis=_names())
    x = alt.X("median:Q", title="times as fast as PEFT's layer, forward and backward; intervals of the median")
    base, color = chart_of(rows), alt.Color("adapter:N", legend=alt.Legend(title=None))
    bars = base.mark_bar().encode(x=x, y=y, color=color)
    spans = base.mark_rule(color=LIGHT.ink, strokeWidth=1.5).encode(x="low:Q", x2="high:Q", y=y)
    even = chart_of([{"median": 1}]).mark_rule(color=LIGHT.ink).encode(x=x)
    return alt.layer(bars, spans, even).properties(width=420, height=18 * len(rows)), ""


def _growth(result: Result) -> Drawn:
    """Rate above, peak memory below, against rank, length and sites."""
    points: list[Result] = [
        {
            "axis": point["axis"],
            "value": point["value"],
            "who": _SHORT[name],
            "rate": point["contestants"][name]["rate"],
            "peak": point["contestants"][name]["peak_bytes"] / 1e9,
        }
        for point in result["points"]
        for name in ("ours", "peft-best")
    ]
    colors = alt.Scale(domain=[_SHORT["ours"], _SHORT["peft-best"]], range=[_OURS, "#838a93"])
    grid = []
    for key, title in (("rate", "real tokens per second"), ("peak", "peak memory, GB")):
        row = []
        for axis in dict.fromkeys(point["axis"] for point in points):
            here = [point for point in points if point["axis"] == axis]
            values = sorted({point["value"] for point in here})
            x = alt.X(
                "value:Q", title=axis, scale=alt.Scale(type="log", base=2, nice=False), axis=alt.Axis(values=values)
            )
            lines = chart_of(here).mark_line(point=alt.OverlayMarkDef(size=36), strokeWidth=2)
            color = alt.Color("who:N", scale=colors, legend=alt.Legend(title=None))
            y = alt.Y(f"{key}:Q", title=title, scale=alt.Scale(zero=True))
            row.append(lines.encode(x=x, y=y, color=color).properties(width=240, height=170))
        grid.append(alt.hconcat(*row, spacing=30))
    return alt.vconcat(*grid, spacing=30), ""


_DRAWN: dict[str, Callable[[Result], Drawn]] = {
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
