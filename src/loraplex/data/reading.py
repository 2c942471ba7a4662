"""From the `data:` options to examples: every source read, its form recognized, a sample taken."""

from __future__ import annotations

import random
from dataclasses import replace

from loraplex.data.builtin import BUILTIN, read_builtin
from loraplex.data.examples import Example, Message, Row
from loraplex.data.forms import reader_for
from loraplex.data.mixing import a_few_of_each_task, by_weight, one_side
from loraplex.data.options import DataOptions, Split
from loraplex.data.sources import read_rows
from loraplex.errors import UserError


def read_examples(options: DataOptions, split: Split) -> list[Example]:
    """Return the examples of `split`, source after source; a sample keeps the order of its file.

    Raises:
        UserError: a source is missing, empty or malformed; the message names the file and the line.
    """
    examples: list[Example] = []
    count = 0
    for source in options.sources(split):
        limit = options.limit(split)
        if source.startswith(BUILTIN):
            found = _read_builtin(source, options, split)
        else:
            found = _read_source(source, options, split)
        count += len(found) if limit is None else min(limit, len(found))
        examples += found if _weighs(options, split) else _sample(found, limit, options.seed)
    if not _weighs(options, split):
        return examples
    return by_weight(examples, options.task_weights, options.task_temperature, count, options.seed)


def _weighs(options: DataOptions, split: Split) -> bool:
    return split == "train" and options.is_weighted


def _sample(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    kept = sorted(random.Random(seed).sample(range(len(examples)), limit))
    return [examples[index] for index in kept]


def _read_builtin(source: str, options: DataOptions, split: Split) -> list[Example]:
    if options.test_share:
        raise UserError(
            f"{source} has rows of its own for evaluation: leave out data.test_share and name it in data.test"
        )
    return read_builtin(source.removeprefix(BUILTIN), split, options.limit(split), options.seed)


def _read_source(source: str, options: DataOptions, split: Split) -> list[Example]:
    """Return all rows of a source that are meant for `split`, before any sample is taken.

    Whether a file is in order does not depend on the seed.
    """
    rows = read_rows(source, options, "train" if options.test_share else split)
    make = reader_for(rows[0], options, split)
    examples = [_finish(make(row), row, options) for row in rows]
    if options.test_share:
        examples = one_side(examples, options, split, source)
    if split == "train" and options.min_words:
        examples = [example for example in examples if _words(example) >= options.min_words]
        if not examples:
            raise UserError(
                f"{source}: data.min_words {options.min_words} leaves none of the {len(rows)} rows: lower it"
            )
    if split == "test" and options.max_test_per_task is not None:
        examples = a_few_of_each_task(examples, options.max_test_per_task, options.seed)
    return examples


def _words(example: Example) -> int:
    """Return the number of words of the prompt, of all turns of a chat."""
    turns = [example.prompt] if isinstance(example.prompt, str) else [turn.content for turn in example.prompt]
    return sum(len(turn.split()) for turn in turns)


def _instruction(row: Row, options: DataOptions) -> str:
    """Return the row's own instruction and input; a template says itself what is asked."""
    if options.prompt is not None:
        return ""
    parts = (row.fields.get("instruction"), row.fields.get("input"))
    return "\n\n".join(part for part in parts if isinstance(part, str) and part) if parts[0] else ""


def _finish(example: Example, row: Row, options: DataOptions) -> Example:
    task = str(row.fields.get("task") or options.task)
    example = replace(example, task=task, source=row.source, instruction=_instruction(row, options))
    if not options.chat or not isinstance(example.prompt, str):
        return example
    # An answer in a chat starts its turn, so the space that would join it to a text prompt goes.
    return replace(
        example,
        prompt=(Message("user", example.prompt.strip()),),
        completion=example.completion.lstrip(),
        choices=tuple(choice.lstrip() for choice in example.choices),
    )
