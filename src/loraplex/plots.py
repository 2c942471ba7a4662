"""What all pictures and tables share: one palette, one look of charts, one smoothing, one set of number formats.

Charts are declared with Altair and name roles, never colors; `chart_config` gives the roles their looks. The report of
a comparison shows them in the browser, `save_picture` makes files of the same charts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.files import write_atomically

if TYPE_CHECKING:
    import altair as alt

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# One fewer than the colors, so that color and shape together tell many arms apart.
SHAPES = ["circle", "square", "diamond", "triangle-up", "cross", "triangle-down"]
FORMS = (".png", ".svg", ".pdf")
"""Endings that `save_picture` takes."""


@dataclass(frozen=True)
class Colors:
    """One color per role."""

    background: str
    ink: str
    muted: str
    grid: str
    front: str
    """The Pareto front."""
    arms: Sequence[str]
    """Far enough apart under normal vision and the three kinds of color blindness; also against the background."""
    faint: str
    """Single values behind their smoothed course, which has the color of the first arm."""
    ranks: Sequence[str]
    """From rank 0 to the highest."""
    gates: Sequence[str]
    """From a gate of 0 over an even one to the largest."""


LIGHT = Colors(
    background="#ffffff",
    ink="#1c2128",
    muted="#5b6470",
    grid="#e6e8eb",
    front="#9aa3ad",
    arms=("#233bb2", "#ea6500", "#0f9f79", "#861d4d", "#855c0a", "#387897", "#9a78e8"),
    faint="#b9c2ea",
    ranks=("#f3f5f8", "#b9cde6", "#6f9bcb", "#33679f", "#16355c"),
    gates=("#2166ac", "#92c5de", "#f7f7f7", "#f4a582", "#b2182b"),
)
DARK = Colors(
    background="#171a1f",
    ink="#e6e8eb",
    muted="#a1a9b3",
    grid="#2c3138",
    front="#6d7682",
    arms=("#5d7df4", "#f26420", "#73f5a5", "#a07390", "#efb616", "#74b2c6", "#decdff"),
    faint="#3c4a85",
    ranks=("#20252c", "#2f4a68", "#3f75ab", "#6fa8dc", "#d2e6fa"),
    gates=("#6fa8dc", "#3f75ab", "#20252c", "#b0553a", "#f09a7a"),
)


def chart_config(colors: Colors, *, alone: bool) -> dict[str, Any]:
    """Return the Vega-Lite configuration that gives the roles in a chart their looks.

    `alone` is for picture files, which bring their own background and margin.
    """
    axis = {
        "labelColor": colors.muted,
        "labelFontSize": 12,
        "titleColor": colors.muted,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 10,
        "gridColor": colors.grid,
        "domain": False,
        "ticks": False,
        "labelPadding": 8,
        "labelOverlap": "greedy",
    }
    legend = {"labelColor": colors.ink, "labelFontSize": 12, "titleColor": colors.muted, "titleFontSize": 12}
    return {
        "background": colors.background if alone else "transparent",
        "font": FONT,
        "padding": 16 if alone else 4,
        "view": {"stroke": None},
        "axis": axis,
        "axisX": {"tickCount": 6},
        # Above the axis and to be read without turning the head; on a phone it takes no width from the chart.
        "axisY": {
            "titleAngle": 0,
            "titleAnchor": "end",
            "titleAlign": "left",
            "titleBaseline": "bottom",
            "titleX": 0,
            "titleY": -12,
        },
        "legend": {
            **legend,
            "titleFontWeight": "normal",
            "orient": "bottom",
            "labelLimit": 300,
            "symbolSize": 90,
            "symbolOpacity": 1,
        },
        "title": {
            "color": colors.ink,
            "subtitleColor": colors.muted,
            "anchor": "start",
            "fontSize": 15,
            "fontWeight": 600,
            "subtitleFontSize": 12,
            "offset": 18,
            "frame": "group",
        },
        "range": {"category": list(colors.arms), "symbol": SHAPES, "heatmap": list(colors.ranks)},
        "style": _styles(colors),
    }


def _styles(colors: Colors) -> dict[str, dict[str, Any]]:
    """Return the looks of the marks that charts name by what they are."""
    return {
        "name": {"color": colors.ink, "fontSize": 13, "fontWeight": 600},
        "number": {"color": colors.muted, "fontSize": 12},
        "label": {"color": colors.ink, "fontSize": 12},
        "front": {"color": colors.front, "strokeWidth": 1.5, "strokeDash": [5, 4]},
        "ring": {"color": colors.ink, "strokeWidth": 1.5},
        "seed": {"color": colors.ink, "thickness": 1.5, "opacity": 0.7},
    }


def chart_of(rows: Sequence[Mapping[str, Any]]) -> alt.Chart:
    """Return a chart of `rows` without a mark."""
    import altair as alt

    return alt.Chart(alt.InlineData(values=[dict(row) for row in rows]))


def chart_spec(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """Return a chart's specification without the address of its schema and without Altair's own looks."""
    spec: dict[str, Any] = chart.to_dict()
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}


def save_picture(path: Path, chart: alt.TopLevelMixin, title: str, subtitle: str, **more: Any) -> None:
    """Write a chart under its title as the kind of picture that the ending of `path` says, see `FORMS`.

    It looks as it does on a white page. `more` replaces parts of the specification, such as its width.
    """
    import vl_convert

    head = {"text": title, "subtitle": subtitle}
    spec = chart_spec(chart) | {"title": head, "config": chart_config(LIGHT, alone=True)} | more
    if path.suffix == ".png":
        write_atomically(path, vl_convert.vegalite_to_png(spec, scale=2))
    elif path.suffix == ".svg":
        write_atomically(path, vl_convert.vegalite_to_svg(spec))
    else:
        write_atomically(path, vl_convert.vegalite_to_pdf(spec))


def smoothed(values: Sequence[float], width: float) -> list[float]:
    """Return the mean of the neighbors of every value, weighted by exp(−d²/2w²) at distance d, up to d = 3w."""
    reach = math.ceil(3 * width)
    means = []
    for center in range(len(values)):
        near = range(max(0, center - reach), min(len(values), center + reach + 1))
        weights = [math.exp(-(((place - center) / width) ** 2) / 2) for place in near]
        means.append(sum(weight * values[place] for weight, place in zip(weights, near, strict=True)) / sum(weights))
    return means


def points(share: float) -> str:
    """Return a difference of accuracies in percentage points with its sign."""
    rounded = round(100 * share, 1)
    return f"{'−' if rounded < 0 else '+' if rounded > 0 else '±'}{abs(rounded):.1f}"


def significant(value: float) -> str:
    """Return three significant digits, never as a power of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.5f}"


def with_prefix(value: float, unit: str = "") -> str:
    """Return three significant digits with a prefix of a power of 1000: "1.93 P"."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{_three(value / size)} {prefix}{unit}"
    return f"{_three(value)} {unit}".rstrip()


def in_bytes(value: float) -> str:
    """Return a size in memory or on disk: "19.6 MB"."""
    return with_prefix(value, "B")


def duration(seconds: float) -> str:
    """Return a time as people say it: "4 min 12 s"."""
    if seconds < 60:
        return f"{significant(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def rate(value: float) -> str:
    """Return a learning rate as it is written in a recipe: "5e-4"."""
    digits, power = f"{value:e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def energy(kwh: float) -> str:
    """Return an energy in watt hours, or kilowatt hours from 1000 on."""
    return with_prefix(1000 * kwh, "Wh")


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
