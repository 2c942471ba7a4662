"""Colors and chart settings of the report, light and dark; charts themselves name roles, never colors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.comparison.results import Comparison

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# One fewer than the colors, so that color and shape together tell many arms apart.
SHAPES = ["circle", "square", "diamond", "triangle-up", "cross", "triangle-down"]


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
    ranks: Sequence[str]
    """From rank 0 to the highest."""


LIGHT = Colors(
    background="#ffffff",
    ink="#1c2128",
    muted="#5b6470",
    grid="#e6e8eb",
    front="#9aa3ad",
    arms=("#233bb2", "#ea6500", "#0f9f79", "#861d4d", "#855c0a", "#387897", "#9a78e8"),
    ranks=("#f3f5f8", "#b9cde6", "#6f9bcb", "#33679f", "#16355c"),
)
DARK = Colors(
    background="#171a1f",
    ink="#e6e8eb",
    muted="#a1a9b3",
    grid="#2c3138",
    front="#6d7682",
    arms=("#5d7df4", "#f26420", "#73f5a5", "#a07390", "#efb616", "#74b2c6", "#decdff"),
    ranks=("#20252c", "#2f4a68", "#3f75ab", "#6fa8dc", "#d2e6fa"),
)


def arm_places(comparisons: Iterable[Comparison]) -> dict[str, int]:
    """Return for every arm's name its place in the palette, the same in all comparisons."""
    names = dict.fromkeys(arm.name for comparison in comparisons for arm in comparison.arms)
    return {name: place for place, name in enumerate(names)}


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
        "halo": {"color": colors.background, "stroke": colors.background, "strokeWidth": 4, "fontSize": 12},
        "label": {"color": colors.ink, "fontSize": 12},
        "front": {"color": colors.front, "strokeWidth": 1.5, "strokeDash": [5, 4]},
        "ring": {"color": colors.ink, "strokeWidth": 1.5},
        "seed": {"color": colors.ink, "thickness": 1.5, "opacity": 0.7},
    }
