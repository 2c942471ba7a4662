"""How step and memory grow with rank, length and number of sites: loraplex and PEFT at its best, a pair a point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from benchmarks import results
from benchmarks.ratios import Comparison
from benchmarks.results import Plan
from benchmarks.rounds import alternate
from benchmarks.terminal import output
from benchmarks.workload import KINDS, TRAINING_FILE, TrainingWork

RANKS = (4, 8, 16, 32, 64, 128, 256)
LENGTHS = (128, 256, 512, 1024, 2048)
KIND_COUNTS = (1, 2, 4, 7)
_LAYERS = 30
"""Of the embedded model: every kind of linear is a site in each."""


@dataclass(frozen=True)
class Point:
    """One pair to measure."""

    axis: str
    value: int
    work: TrainingWork


def points(quick: bool) -> Iterator[Point]:
    """Yield what is measured: one thing varies, the rest is the training benchmark's (r = 16, all sites, its rows)."""
    ours = TrainingWork("loraplex")
    for rank in (4, 64) if quick else RANKS:
        yield Point("rank", rank, replace(ours, rank=rank))
    for length in (64, 128) if quick else LENGTHS:
        yield Point("length", length, replace(ours, length=length))
    for count in (1, 2) if quick else KIND_COUNTS:
        yield Point("sites", count * _LAYERS, replace(ours, kinds=KINDS[:count]))


def run(plan: Plan) -> None:
    """Measure all points, print the table and write `growth.json`.

    Raises:
        UserError: the benchmark sets are not on this machine.
    """
    from loraplex.data.sources import benchmark_path

    benchmark_path(TRAINING_FILE)
    result = {**results.header("growth", plan), "points": [measure(point, plan) for point in points(plan.quick)]}
    show(result)
    results.write(result, plan)


def measure(point: Point, plan: Plan) -> dict[str, Any]:
    """Return rates, peaks and their ratios at one point."""
    pair = {"ours": point.work, "peft-best": replace(point.work, library="peft", setting="best")}
    records = alternate(
        "benchmarks.training_worker",
        {name: asdict(work) for name, work in pair.items()},
        rounds=plan.rounds,
        warm_up=plan.warm_up,
        title=f"growth with {point.axis} {point.value}",
    )
    comparisons = [Comparison("ours", "peft-best"), Comparison("ours", "peft-best", "memory")]
    return {"axis": point.axis, "value": point.value, **results.contest({}, records, comparisons, "real tokens")}


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(
        "varies", "value", "ours tokens/s", "PEFT best", "× faster", "interval", "ours MB", "PEFT MB", "memory ×"
    )
    for point in result["points"]:
        ours, peers = point["contestants"]["ours"], point["contestants"]["peft-best"]
        speed, memory = point["comparisons"]
        table.add_row(
            point["axis"],
            str(point["value"]),
            *(f"{side['rate']:.0f}" for side in (ours, peers)),
            f"{speed['median']:.2f}",
            results.bounds(speed),
            *(f"{side['peak_bytes'] / 1e6:.0f}" for side in (ours, peers)),
            f"{memory['median']:.2f}",
        )
    output.print(table)
