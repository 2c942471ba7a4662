"""What a run leaves about its router: routing.json with sites, tasks and steps, a picture of it, and two numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from loraplex.analysis.routing_plot import draw_routing
from loraplex.data import tokenize, tokenize_texts
from loraplex.files import write_json
from loraplex.training.folder import RunFolder
from loraplex.training.preparation import Rows
from loraplex.training.recipe import Recipe
from loraplex.tuner.routing import ROWS_PER_TASK, by_task, history, overview, plain


@dataclass(frozen=True)
class RoutedRows:
    """The rows on which the finished adapter's gates are looked at."""

    split: str
    """Which rows of the run: test or training."""
    ids: list[list[int]]
    tasks: list[str]


def routed_rows(recipe: Recipe, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> RoutedRows:
    """Return the test rows with their tasks; in a run without any the first training rows, as one task."""
    if rows.test:
        found = (
            tokenize_texts(rows.test, tokenizer, recipe.classes)
            if recipe.model.classifies
            else tokenize(rows.test, tokenizer)
        )
        ids = [row["input_ids"][: recipe.training.max_length] for row in found.rows]
        return RoutedRows("test", ids, [example.task for example in rows.test])
    ids = [row["input_ids"] for row in rows.train.rows[:ROWS_PER_TASK]]
    return RoutedRows("training", ids, [""] * len(ids))


def write_routing(
    folder: RunFolder, model: PeftModel, rows: RoutedRows, log: Sequence[Mapping[str, Any]], title: str
) -> dict[str, float]:
    """Measure the gates of `model`, write them with their course in training, and return the means over the tasks.

    `log` is the trainer's history; the picture is called `title`.
    """
    found = by_task(model, rows.ids, rows.tasks)
    whole = {**history(log), "rows": rows.split, "tasks": {task: plain(sites) for task, sites in found.items()}}
    write_json(folder.routing, whole)
    draw_routing(folder.routing_plot, whole, title)
    each = [overview(sites) for sites in found.values()]
    return {key: sum(task[key] for task in each) / len(each) for key in each[0]}
