"""What a comparison leaves behind, as plain data: results.json, and one CSV row per run and per item.

Everything the statistics and the report need is in these classes; neither reads a run folder.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from loraplex.errors import UserError
from loraplex.files import write_atomically, write_json

FORMAT = 1
RESULTS, RUNS_CSV, ITEMS_CSV = "results.json", "runs.csv", "items.csv"
# Columns of runs.csv that are fields of Run under the same name.
_RUN_COLUMNS = (
    "seed",
    "state",
    "accuracy",
    "standard_error",
    "trainable",
    "deployed",
    "file_bytes",
    "steps",
    "seconds_per_step",
    "training_seconds",
    "tokens_per_second",
    "peak_bytes",
    "flops",
    "energy_kwh",
    "error",
)


@dataclass(frozen=True)
class Item:
    """One test item and what became of it under one run."""

    id: str
    task: str
    correct: bool


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    seed: int
    state: Literal["finished", "failed", "missing"]
    command: str
    """Repeats this run, to be typed in a shell."""
    error: str | None = None
    """One line, where the run failed."""
    accuracy: float | None = None
    standard_error: float | None = None
    """Over the test items."""
    tasks: dict[str, float] = field(default_factory=dict)
    """Accuracy per task, where there are several."""
    loss: list[tuple[int, float]] = field(default_factory=list)
    """(optimizer step, training loss in nats per learned token)."""
    trainable: int | None = None
    """Parameters that were trained, all of them counted."""
    file_bytes: int | None = None
    """Size of the saved adapter's weights."""
    steps: int | None = None
    seconds_per_step: float | None = None
    training_seconds: float | None = None
    tokens_per_second: float | None = None
    """Real tokens, padding not counted."""
    peak_bytes: int | None = None
    """Peak memory of training above the process's size after loading the model."""
    flops: float | None = None
    """Of all training steps, forward and backward."""
    energy_kwh: float | None = None
    """As estimated by codecarbon, where it is installed."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Rank by site name; empty for adapters without ranks."""
    items: list[Item] = field(default_factory=list)
    """In the order of the test rows, the same for all arms of a seed."""
    deployed: int | None = None
    """Those of the trained parameters that are left after an allocation has closed ranks."""

    @property
    def parameters(self) -> int | None:
        """What the run has spent of its budget."""
        return self.trainable if self.deployed is None else self.deployed


@dataclass(frozen=True)
class Trial:
    """One learning rate that was tried for an arm, on validation items."""

    learning_rate: float
    accuracy: float | None
    standard_error: float | None
    error: str | None = None


@dataclass(frozen=True)
class Arm:
    """One way of adapting the model, with its runs."""

    name: str
    summary: str
    """The adapter in a few words: "dora r=8", "PEFT ADALORA"."""
    learning_rate: float
    trainable: int
    """As planned, before any run: what is left at the end of training."""
    within_budget: bool
    """False where the method cannot spend the budget to within 2 %."""
    runs: list[Run]
    trials: list[Trial] = field(default_factory=list)
    """Empty where the learning rate was given."""
    candidates: int | None = None
    """Parameters trained at some time, where an allocation leaves less at the end."""


@dataclass(frozen=True)
class Comparison:
    """A whole comparison, finished or not."""

    name: str
    description: str
    """The comment at the head of the recipe, or ""."""
    command: str
    """Repeats everything."""
    model: str
    rows: str
    """What was trained and tested on, in a line."""
    budget: str
    """As asked for: "match: lora r=16", "0.5 %", "none"."""
    budget_parameters: int | None
    reference: str
    """Name of the arm that the others are compared with."""
    seeds: list[int]
    arms: list[Arm]
    base: Run | None
    """The base model without any adapter, on the same items (seed is that of the first run)."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions and machine, as a run's environment.json has them."""

    def arm(self, name: str) -> Arm:
        """Return the arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


def write_results(comparison: Comparison, folder: Path) -> None:
    """Write results.json, runs.csv and items.csv into `folder`, each of them whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULTS, {"format": FORMAT, **asdict(comparison)})
    runs = [(arm, run) for arm in comparison.arms for run in arm.runs]
    header = ["arm", "learning_rate", *_RUN_COLUMNS]
    rows = [[arm.name, arm.learning_rate, *(getattr(run, name) for name in _RUN_COLUMNS)] for arm, run in runs]
    _write_csv(folder / RUNS_CSV, [header, *rows])
    named = [(arm.name, run) for arm, run in runs]
    if comparison.base is not None:
        named.insert(0, ("base model", comparison.base))
    items = [[name, run.seed, item.id, item.task, int(item.correct)] for name, run in named for item in run.items]
    _write_csv(folder / ITEMS_CSV, [["arm", "seed", "item", "task", "correct"], *items])


def read_results(folder: Path) -> Comparison:
    """Read a comparison back.

    Raises:
        UserError: when there is none in `folder`, or it is damaged or of another format.
    """
    path = folder / RESULTS
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        found = plain.pop("format")
    except FileNotFoundError:
        raise UserError(f"there are no results of a comparison in '{folder}': {RESULTS} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    if found != FORMAT:
        raise UserError(f"{path} was written by another version of loraplex: run the comparison again")
    try:
        return _comparison(plain)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({error}): run `loraplex compare` again, finished runs are kept")


def _comparison(plain: dict[str, Any]) -> Comparison:
    arms = [
        Arm(**{**arm, "runs": [_run(run) for run in arm["runs"]], "trials": [Trial(**t) for t in arm["trials"]]})
        for arm in plain["arms"]
    ]
    return Comparison(**{**plain, "arms": arms, "base": _run(plain["base"]) if plain["base"] else None})


def _run(plain: dict[str, Any]) -> Run:
    loss = [(int(step), float(value)) for step, value in plain["loss"]]
    return Run(**{**plain, "loss": loss, "items": [Item(**item) for item in plain["items"]]})


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_atomically(path, text.getvalue())
