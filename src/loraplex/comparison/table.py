"""The table of the report as data: what is in each cell, and what it is sorted by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from loraplex.comparison.results import Arm, Comparison, Run
from loraplex.comparison.summary import ArmStatistics, Contrast, Summary

NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """One cell: what is read, and the number by which its column is sorted; None comes last."""

    text: str = NOTHING
    value: float | None = None
    below: str | None = None
    """A second, smaller line."""
    mark: str | None = None
    """One word that stands out."""


@dataclass(frozen=True)
class Column:
    """One column with its heading."""

    group: str
    title: str
    explanation: str
    first: Literal["ascending", "descending"]
    """The order that the first click on the heading gives."""
    cell: Callable[[Row], Cell] = field(repr=False)


@dataclass(frozen=True)
class Row:
    """An arm, or the base model, with what its cells are made from."""

    name: str
    summary: str
    arm: Arm | None
    """None for the base model."""
    runs: Sequence[Run]
    """The finished ones."""
    statistics: ArmStatistics | None = None
    contrast: Contrast | None = None
    budget: int | None = None
    is_reference: bool = False

    def mean(self, measure: Callable[[Run], float | None]) -> float | None:
        """Return the mean over the finished runs that have this value, or None."""
        values = [value for run in self.runs if (value := measure(run)) is not None]
        return fmean(values) if values else None

    def troubles(self) -> list[Run]:
        """Return the runs that failed or have not been made."""
        return [run for run in self.arm.runs if run.state != "finished"] if self.arm is not None else []


def rows(comparison: Comparison, summary: Summary) -> list[Row]:
    """Return the base model and then the arms, in the order of the recipe."""
    statistics = {row.arm: row for row in summary.arms}
    contrasts = {contrast.arm: contrast for contrast in summary.contrasts}
    first = []
    if comparison.base is not None:
        first.append(Row("base model", "no adapter", None, [comparison.base]))
    return first + [
        Row(
            arm.name,
            arm.summary,
            arm,
            [run for run in arm.runs if run.state == "finished"],
            statistics.get(arm.name),
            contrasts.get(arm.name),
            comparison.budget_parameters,
            arm.name == comparison.reference,
        )
        for arm in comparison.arms
    ]


def columns(table: Sequence[Row], reference: str) -> list[Column]:
    """Return the columns that have something to show; those of the results are always there."""
    versus = f"against {reference}" if len(reference) <= 16 else "against the reference"
    results = [
        Column("accuracy, %", "mean", "Mean over the seeds, with its 95 % interval", "descending", _accuracy),
        Column("accuracy, %", "± seeds", "Standard deviation between the seeds, points", "ascending", _between),
        Column("accuracy, %", "± items", "Standard error from the test items, points", "ascending", _items),
        Column(versus, "points", "Difference of the means, with its 95 % interval", "descending", _difference),
        Column(versus, "p", "Corrected for the number of arms; none with one seed", "ascending", _p_value),
    ]
    costs = [
        Column("size", "parameters", "Trainable parameters", "ascending", _parameters),
        _cost("size", "file", "Size of the saved weights", lambda run: run.file_bytes, in_bytes),
        _cost("cost", "s/step", "Seconds per optimizer step", lambda run: run.seconds_per_step, significant),
        Column("cost", "tokens/s", "Real tokens per second, padding not counted", "descending", _tokens),
        _cost("cost", "memory", "Peak of training above the loaded model", lambda run: run.peak_bytes, in_bytes),
        _cost("cost", "training", "Time of the whole training", lambda run: run.training_seconds, duration),
        _cost("cost", "FLOPs", "Of all training steps, forward and backward", lambda run: run.flops, with_prefix),
        _cost("cost", "energy", "Of the training, as estimated by codecarbon", lambda run: run.energy_kwh, energy),
    ]
    filled = [column for column in costs if any(column.cell(row).value is not None for row in table)]
    return results + filled


def _cost(
    group: str, title: str, explanation: str, measure: Callable[[Run], float | None], show: Callable[[float], str]
) -> Column:
    def cell(row: Row) -> Cell:
        value = row.mean(measure)
        return Cell() if value is None else Cell(show(value), value)

    return Column(group, title, explanation, "ascending", cell)


def _accuracy(row: Row) -> Cell:
    if row.statistics is None:
        value = row.mean(lambda run: run.accuracy)
        return Cell() if value is None else Cell(f"{100 * value:.1f}", value)
    value, interval = row.statistics.mean, row.statistics.interval
    below = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else None
    return Cell(f"{100 * value:.1f}", value, below)


def _between(row: Row) -> Cell:
    value = row.statistics.between_seeds if row.statistics else None
    return Cell() if value is None else Cell(f"{100 * value:.1f}", value)


def _items(row: Row) -> Cell:
    value = row.statistics.standard_error if row.statistics else row.mean(lambda run: run.standard_error)
    return Cell() if value is None else Cell(f"{100 * value:.1f}", value)


def _difference(row: Row) -> Cell:
    if row.is_reference and row.statistics is not None:
        return Cell("reference", 0.0)
    if row.contrast is None:
        return Cell()
    low, high = row.contrast.interval
    below = f"{points(low)} to {points(high)}"
    verdict = row.contrast.verdict
    return Cell(points(row.contrast.difference), row.contrast.difference, below, verdict if verdict != "open" else None)


def _p_value(row: Row) -> Cell:
    # One seed's p is about two adapters; beside the others it would read as a verdict on two methods.
    if row.contrast is None or row.contrast.seeds == 1:
        return Cell()
    value = row.contrast.adjusted_p_value
    return Cell("< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0"), value)


def _parameters(row: Row) -> Cell:
    if row.arm is None:
        return Cell()
    value = row.mean(lambda run: run.parameters)
    if value is None:
        value = float(row.arm.trainable)
    below = f"of {row.arm.candidates:,} in candidates" if row.arm.candidates is not None else None
    if not row.arm.within_budget:
        off = f"{100 * value / row.budget:.3g} % of budget" if row.budget else "outside the budget"
        below = off if below is None else f"{off}, {below}"
    return Cell(f"{value:,.0f}", value, below, None if row.arm.within_budget else "outside")


def _tokens(row: Row) -> Cell:
    value = row.mean(lambda run: run.tokens_per_second)
    return Cell() if value is None else Cell(f"{value:,.0f}", value)


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
