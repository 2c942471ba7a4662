"""A benchmark's result: written as JSON, shown as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.environment import environment
from benchmarks.ratios import Comparison
from benchmarks.rounds import ROOT, Record
from benchmarks.terminal import output
from loraplex.files import write_json

COMMITTED = ROOT / "benchmarks" / "results"
QUICK = ROOT / "build" / "benchmarks"
"""Where the results of --quick go: they show that a benchmark works, not how fast anything is."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int = 9
    warm_up: int = 2
    quick: bool = False

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return QUICK if self.quick else COMMITTED


def header(name: str, plan: Plan) -> dict[str, Any]:
    """Return how every result begins; take it before the measurement, because it notes how busy the machine is."""
    return {"benchmark": name, "rounds": plan.rounds, "warm_up": plan.warm_up, "environment": environment()}


def write(result: dict[str, Any], plan: Plan) -> None:
    """Write a result under its name."""
    path = plan.folder / f"{result['benchmark']}.json"
    write_json(path, result)
    output.print(f"written to {path.relative_to(ROOT)}")


def read(name: str, folder: Path = COMMITTED) -> dict[str, Any] | None:
    """Return a result, None where it has not been measured."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def contest(
    beginning: dict[str, Any], records: dict[str, Record], comparisons: Iterable[Comparison], unit: str
) -> dict[str, Any]:
    """Return the result of contestants that took turns; comparisons with one that was not there are left out."""
    wanted = [comparison for comparison in comparisons if {comparison.of, comparison.over} <= records.keys()]
    return {
        **beginning,
        "unit": unit,
        "contestants": {name: record.to_json() for name, record in records.items()},
        "comparisons": [comparison.measure(records) for comparison in wanted],
    }


def show(result: dict[str, Any]) -> None:
    """Print the tables of such a result."""
    rates = Table(
        "contestant", f"{result['unit']}/s", "median s", "peak MB", "above loaded MB", title=result["benchmark"]
    )
    for name, record in result["contestants"].items():
        above = record["peak_bytes"] - record["loaded_bytes"]
        middle = sorted(record["seconds"])[len(record["seconds"]) // 2]
        rates.add_row(
            name, f"{record['rate']:.1f}", f"{middle:.3f}", f"{record['peak_bytes'] / 1e6:.0f}", f"{above / 1e6:.0f}"
        )
    output.print(rates)
    ratios = Table("quantity", "of", "over", "median", "95 % interval", "goal")
    for entry in result["comparisons"]:
        ratios.add_row(
            entry["quantity"], entry["of"], entry["over"], f"{entry['median']:.3f}", bounds(entry), goal(entry)
        )
    output.print(ratios)


def bounds(entry: dict[str, Any]) -> str:
    """Return the interval of a comparison as text; with its coverage where that is below .95."""
    if len(entry["ratios"]) == 1:
        return "–"
    text = f"{entry['low']:.3f} – {entry['high']:.3f}"
    return text if entry["coverage"] >= 0.95 else f"{text} ({entry['coverage']:.0%})"


def goal(entry: dict[str, Any]) -> str:
    """Return the goal of a comparison and whether it is reached, as text."""
    if entry["goal"] is None:
        return ""
    sign = "≥" if entry["quantity"] == "speed" else "≤"
    return f"{sign} {entry['goal']:g} {'reached' if entry['reached'] else 'missed'}"
