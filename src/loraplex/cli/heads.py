"""`loraplex heads`: how many groups a data set falls into, for the number of heads of a routed adapter."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.cli.arguments import Parser, add_keys, in_words_of, section
from loraplex.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from loraplex.analysis.clustering import Grouping
    from loraplex.data import Example


DESCRIPTION = """Suggest a number of heads for a routed adapter, from the prompts of DATA.

DATA is a file, a hub id, builtin:NAME or benchmark:FILE, or a recipe, whose training rows are meant. The prompts
are clustered by their words (TF-IDF), as in HydraLoRA's paper; a recipe with `heads: auto` does the same."""

KEYS = {
    "--prompt": "data.prompt",
    "--config": "data.config",
    "--split": "data.train_split",
    "--limit": "data.max_train",
    "--seed": "data.seed",
}
CHANGED = {
    "--prompt": {"help": "The text to group by, with {field} for a field of the row."},
    "--seed": {"help": "Decides samples and starts."},
}


def parser(prog: str) -> Parser:
    """Return the parser of the command line."""
    made = Parser(prog, DESCRIPTION)
    made.add_argument("sources", metavar="DATA", nargs="+")
    made.add_argument(
        "--method",
        choices=("kmeans", "ward", "dbscan"),
        default="kmeans",
        help="How groups are found; ward is hierarchical. [kmeans]",
    )
    made.add_argument("--least", type=int, default=2, metavar="N", help="Smallest number of groups to try. [2]")
    made.add_argument("--most", type=int, default=10, metavar="N", help="Largest number of groups to try. [10]")
    add_keys(made, KEYS, CHANGED)
    made.add_argument("--output", type=Path, metavar="FOLDER", help="Folder for pictures: curve, tree, t-SNE map.")
    made.add_argument("--json", action="store_true", help="Print everything as JSON, with the group of every row.")
    return made


def run(arguments: Namespace) -> None:
    """Find the groups, and print or draw them."""
    output: Path | None = arguments.output
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"output '{output}' is a file: give a folder")
    sources: list[str] = arguments.sources
    with in_words_of(KEYS):
        examples = _read(sources, section(arguments, "data"))

    from loraplex.analysis.clustering import group_texts

    found = group_texts(
        [example.asked for example in examples],
        arguments.method,
        least=arguments.least,
        most=arguments.most,
        seed=section(arguments, "data")["seed"],
    )
    tasks = [example.task for example in examples]
    files = []
    if output is not None:
        from loraplex.analysis.pictures import draw_grouping

        files = draw_grouping(output, found, tasks, f"Groups of prompts in {', '.join(sources)}")
    if arguments.json:
        print(json.dumps(as_plain(found, examples), indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        for part in render(found, tasks):
            console.print(part)
    for file in files:
        print(f"drawn: {file}", file=sys.stderr if arguments.json else sys.stdout)


def _read(sources: Sequence[str], given: Mapping[str, Any]) -> list[Example]:
    """Return the training rows of the sources, or of the one recipe that is named instead."""
    from loraplex.data import DataOptions, read_examples

    recipes = [source for source in sources if source.endswith((".yaml", ".yml"))]
    if not recipes:
        # A template needs a completion, which nobody looks at here.
        completion = None if given["prompt"] is None else ""
        return read_examples(DataOptions(train=tuple(sources), completion=completion, **given), "train")
    if len(sources) > 1:
        raise UserError(f"'{recipes[0]}' is a recipe: give it alone, its own rows are meant")
    if given["prompt"] is not None or given["max_train"] is not None:
        raise UserError("--prompt and --limit go with data: a recipe says itself what its rows are")
    from loraplex.training.reading import read_recipe

    return read_examples(read_recipe(recipes[0]).data, "train")


def as_plain(found: Grouping, examples: Sequence[Example]) -> dict[str, Any]:
    """Return the evidence and the group of every row as plain values."""
    rows = [examples[index] for index in found.points.rows.tolist()]
    counts = by_task(found, [example.task for example in examples])
    return {
        **found.evidence(),
        "tasks": {task: dict(sorted(count.items())) for task, count in counts.items()},
        "rows": [
            {"source": example.source, "group": label}
            for example, label in zip(rows, found.labels.tolist(), strict=True)
        ],
    }


def by_task(found: Grouping, tasks: Sequence[str]) -> dict[str, Counter[int]]:
    """Return for every task how many of its rows are in each group; empty where rows have no tasks."""
    counts: dict[str, Counter[int]] = {}
    for index, label in zip(found.points.rows.tolist(), found.labels.tolist(), strict=True):
        counts.setdefault(tasks[index], Counter())[label] += 1
    return dict(sorted(counts.items())) if any(counts) else {}


def render(found: Grouping, tasks: Sequence[str]) -> list[RenderableType]:
    """Return what to print."""
    from rich.markup import escape

    texts = f"{len(found.points):,} of {len(tasks):,} texts"
    if found.points.wordless:
        texts += f", {found.points.wordless:,} without words"
    parts: list[RenderableType] = [f"heads: {found.number}", escape(f"{found.reason} ({found.method}, {texts})"), ""]
    parts += [_partitions(found), "", _groups(found)]
    if counts := by_task(found, tasks):
        parts += ["", _tasks(found, counts)]
    return parts


def _partitions(found: Grouping) -> RenderableType:
    from rich.table import Table

    table = Table(title="What was tried", title_justify="left")
    for heading in ("groups", "inertia", "silhouette"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for partition in found.partitions:
        marks = {"elbow": found.elbow, "highest silhouette": found.best_silhouette, "suggested": found.number}
        said = ", ".join(word for word, number in marks.items() if number == partition.groups)
        table.add_row(str(partition.groups), f"{partition.inertia:,.1f}", f"{partition.silhouette:.3f}", said)
    return table


def _groups(found: Grouping) -> RenderableType:
    from rich.table import Table

    table = Table(title=f"The {len(found.groups)} groups", title_justify="left")
    table.add_column("group", justify="right")
    table.add_column("texts", justify="right")
    table.add_column("typical words", overflow="fold")
    for number, group in enumerate(found.groups, start=1):
        table.add_row(str(number), f"{group.size:,}", ", ".join(group.words))
    if noise := int((found.labels < 0).sum()):
        table.add_row("none", f"{noise:,}", "noise")
    return table


def _tasks(found: Grouping, counts: Mapping[str, Counter[int]]) -> RenderableType:
    from rich.table import Table

    table = Table(title="Texts of a task in each group", title_justify="left")
    table.add_column("task", overflow="fold")
    labels = [*range(len(found.groups)), *([-1] if -1 in found.labels else [])]
    for label in labels:
        table.add_column("none" if label < 0 else str(label + 1), justify="right")
    for task, count in counts.items():
        table.add_row(task or "-", *(f"{count[label]:,}" if count[label] else "·" for label in labels))
    return table
