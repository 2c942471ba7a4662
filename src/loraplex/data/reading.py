"""From the `data:` options to examples: every source read, its form recognized, a sample taken."""

from __future__ import annotations

import random
from dataclasses import replace

from loraplex.data.builtin import BUILTIN, read_builtin
from loraplex.data.examples import Example, Message, Row
from loraplex.data.forms import reader, recognize
from loraplex.data.options import DataOptions, Split
from loraplex.data.sources import read_rows
from loraplex.errors import UserError


def read_examples(options: DataOptions, split: Split) -> list[Example]:
    """Return the examples of `split`, source after source; a sample keeps the order of its file.

    Raises:
        UserError: a source is missing, empty or malformed; the message names the file and the line.
    """
    examples: list[Example] = []
    for source in options.sources(split):
        if source.startswith(BUILTIN):
            name = source.removeprefix(BUILTIN)
            examples += read_builtin(name, split, options.limit(split), options.seed)
        else:
            examples += _read_source(source, options, split)
    return examples


def _read_source(source: str, options: DataOptions, split: Split) -> list[Example]:
    rows = read_rows(source, options, split)
    form = recognize(rows[0], options) if options.format == "auto" else options.format
    make = reader(form, options, split)
    # All rows are read before the sample is taken: whether a file is in order does not depend on the seed.
    examples = [_finish(make(row), row, options) for row in rows]
    if split == "train" and options.min_words:
        examples = [example for example in examples if _words(example) >= options.min_words]
        if not examples:
            raise UserError(
                f"{source}: data.min_words {options.min_words} leaves none of the {len(rows)} rows: lower it"
            )
    limit = options.limit(split)
    if limit is None or limit >= len(examples):
        return examples
    kept = sorted(random.Random(options.seed).sample(range(len(examples)), limit))
    return [examples[index] for index in kept]


def _words(example: Example) -> int:
    """Return the number of words of the prompt, of all turns of a chat."""
    turns = [example.prompt] if isinstance(example.prompt, str) else [turn.content for turn in example.prompt]
    return sum(len(turn.split()) for turn in turns)


def _finish(example: Example, row: Row, options: DataOptions) -> Example:
    task = str(row.fields.get("task") or options.task)
    example = replace(example, task=task, source=row.source)
    if not options.chat or not isinstance(example.prompt, str):
        return example
    # An answer in a chat starts its turn, so the space that would join it to a text prompt goes.
    return replace(
        example,
        prompt=(Message("user", example.prompt.strip()),),
        completion=example.completion.lstrip(),
        choices=tuple(choice.lstrip() for choice in example.choices),
    )
