"""Multiple choice by likelihood: `loraplex.evaluation` against lm-evaluation-harness, on the same rows and template.

A round is a slice of ARC-Easy's 500-item file in option-text form; five slices make the file.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks import results
from benchmarks.ratios import Comparison
from benchmarks.results import Plan
from benchmarks.rounds import ContestantError, Record, alternate
from benchmarks.terminal import output
from loraplex.data import DataOptions, Example, read_examples
from loraplex.errors import UserError

TEST_FILE = "benchmark:commonsense/ARC-Easy/test500.jsonl.gz"
DType = Literal["bfloat16", "float32"]
_BATCH_SIZES = (4, 8, 16, 32)
"""Among which the harness's best is searched."""
_PROBE_ITEMS = 40
_DIFFERENT_ANSWERS = {"bfloat16": 0.02, "float32": 0.0}
"""Share of items that may be answered otherwise than by loraplex: bf16 rounds by batch, and near ties turn over."""


@dataclass(frozen=True)
class EvaluationWork:
    """What one evaluation contestant does, told to its process as JSON."""

    library: Literal["loraplex", "lm-eval"]
    batch_size: int | None
    """The harness's; loraplex runs with its own default."""
    items: int = 500
    items_a_round: int = 100
    dtype: DType = "bfloat16"


def items() -> list[Example]:
    """Return the items.

    Raises:
        UserError: the benchmark sets are not on this machine.
    """
    return read_examples(DataOptions(test=TEST_FILE), "test")


def run(plan: Plan, dtype: DType) -> None:
    """Find the harness's best batch size, measure, print the tables and write `evaluation.json`.

    Raises:
        UserError: the harness is not installed, or the benchmark sets are not on this machine.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("the evaluation benchmark needs lm-evaluation-harness: pip install 'loraplex[eval]'")
    right = [example.answer for example in items()]
    beginning = results.header("evaluation", plan)
    size = {"items": 20, "items_a_round": 10} if plan.quick else {"items": 500, "items_a_round": 100}
    probed = _probe(plan, dtype)
    best = max(probed, key=probed.__getitem__)
    contestants = {
        "ours": EvaluationWork("loraplex", None, dtype=dtype, **size),
        "lm-eval-default": EvaluationWork("lm-eval", 1, dtype=dtype, **size),
        "lm-eval-best": EvaluationWork("lm-eval", best, dtype=dtype, **size),
    }
    records = _alternate(contestants, plan.rounds, plan.warm_up, "evaluation")
    accuracy = _accuracy(records, right, size["items_a_round"], dtype)
    comparisons = (Comparison("ours", "lm-eval-default", goal=5.0), Comparison("ours", "lm-eval-best", goal=2.5))
    beginning["settings"] = {"file": TEST_FILE, "dtype": dtype, **size, "harness_best_batch_size": best}
    result = results.contest(beginning, records, comparisons, unit="items")
    result.update(batch_sizes_probed=probed, accuracy=accuracy)
    results.show(result)
    output.print(f"items/s of the harness by batch size: {probed}\naccuracy: {accuracy}")
    results.write(result, plan)


def _alternate(works: dict[str, EvaluationWork], rounds: int, warm_up: int, title: str) -> dict[str, Record]:
    told = {name: asdict(work) for name, work in works.items()}
    return alternate("benchmarks.evaluation_worker", told, rounds=rounds, warm_up=warm_up, title=title)


def _probe(plan: Plan, dtype: DType) -> dict[int, float]:
    """Return the harness's items per second by batch size, from two rounds each."""
    sizes = (8,) if plan.quick else _BATCH_SIZES
    count = 10 if plan.quick else _PROBE_ITEMS
    works = {str(size): EvaluationWork("lm-eval", size, count, count, dtype) for size in sizes}
    records = _alternate(works, rounds=2, warm_up=1, title="batch size of lm-eval")
    return {int(name): round(record.rate, 2) for name, record in records.items()}


def _accuracy(records: dict[str, Record], right: list[int | None], step: int, dtype: DType) -> dict[str, Any]:
    """Return accuracy and items by contestant, over the slices that were counted, each once.

    Raises:
        ContestantError: the libraries do not agree on the answers.
    """
    # By contestant and item; a slice that came twice is counted once.
    answers = {
        name: {
            part["slice"] * step + place: choice for part in record.extra for place, choice in enumerate(part["chosen"])
        }
        for name, record in records.items()
    }
    found: dict[str, Any] = {}
    for name, chosen in answers.items():
        differing = sum(answers["ours"][item] != choice for item, choice in chosen.items())
        if differing > _DIFFERENT_ANSWERS[dtype] * len(chosen):
            raise ContestantError(f"{name} answers {differing} of {len(chosen)} items otherwise than loraplex")
        correct = sum(right[item] == choice for item, choice in chosen.items())
        found[name] = {"accuracy": correct / len(chosen), "items": len(chosen), "answered_otherwise": differing}
    return found
