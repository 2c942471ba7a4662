"""The `data:` section of a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from loraplex.errors import UserError, nearest

Format = Literal["auto", "completion", "messages", "alpaca", "choices", "template", "commonsense", "commonsense-labels"]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class DataOptions:
    """Where the rows come from and how they become prompts.

    A source is a JSON-lines file (plain or `.gz`), a folder or hub id that `datasets.load_dataset` reads,
    `builtin:NAME` (a procedural task of reasoning-gym) or `benchmark:FOLDER/FILE` (under `LORAPLEX_DATA` or
    `../shared/data`). A list of sources is read one after the other.

    Raises:
        UserError: a value is out of range, or options that do not belong together are set.
    """

    train: str | tuple[str, ...] | None = None
    """Source of the training rows."""
    test: str | tuple[str, ...] | None = None
    """Source of the rows for evaluation."""
    format: Format = "auto"
    """The form of the rows; `auto` recognizes it from the fields of the first row."""
    prompt: str | None = None
    """Template form: the prompt, with {field} for the fields of a row."""
    second: str | None = None
    """Template form, for `model.head: classification`: a second text that is read together with the prompt."""
    completion: str | None = None
    """Template form: the completion, for rows without choices."""
    choices: tuple[str, ...] = ()
    """Template form: the options, each as a completion, so usually with a leading space; or the names of the
    classes."""
    answer: str = "answer"
    """Template form: the field that holds the right option as index, letter or text."""
    chat: bool = False
    """Asks a text prompt as a user message through the tokenizer's chat template."""
    task: str = ""
    """The task of rows that have no `task` field of their own."""
    max_train: int | None = None
    """Takes a seeded sample of at most this many rows from each training source; a built-in task makes this many."""
    max_test: int | None = None
    """Takes a seeded sample of at most this many rows from each source of evaluation rows."""
    max_test_per_task: int | None = None
    """Takes a seeded sample of at most this many evaluation rows of each task of a source."""
    test_share: float = 0.0
    """Splits the sources in `train` by item: this share of the items, by a hash of their prompts, is for evaluation."""
    task_weights: Mapping[str, float] = field(default_factory=dict)
    """Task -> weight of its share of the training rows, 1 where none is given; their number stays as it is."""
    task_temperature: float = 1.0
    """Evens out the shares of large and small tasks: a task counts as (its rows)^(1 / temperature)."""
    min_words: int = 0
    """Leaves out training rows whose prompt has fewer words, those of a template included."""
    group: str | None = None
    """"2/3": only rows of the second of three groups of prompts, those that `loraplex heads` finds in the training
    rows."""
    seed: int = 0
    """Decides which rows are sampled and which items a built-in task makes; not the seed of training."""
    config: str | None = None
    """Hub data sets: the configuration."""
    train_split: str = "train"
    """Hub data sets: the split with the training rows."""
    test_split: str = "test"
    """Hub data sets: the split with the rows for evaluation."""

    def __post_init__(self) -> None:
        """Check what can be checked without reading data."""
        known = get_args(Format)
        if self.format not in known:
            hint = nearest(self.format, known) or f" Known are {', '.join(known)}."
            raise UserError(f"data.format '{self.format}' is unknown.{hint}")
        for name in ("max_train", "max_test", "max_test_per_task"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise UserError(f"data.{name} is {limit}; it has to be at least 1, or absent for all rows")
        self._check_template()
        self._check_shares()
        if self.group is not None:
            _parse_group(self.group)

    def _check_shares(self) -> None:
        if not 0 <= self.test_share < 1:
            raise UserError(f"data.test_share is {self.test_share}; it has to be from 0 to below 1")
        if self.test_share and self.test is not None:
            raise UserError("data.test_share takes the rows for evaluation out of data.train, but data.test names some")
        if not 0 < self.task_temperature < math.inf:
            raise UserError(f"data.task_temperature is {self.task_temperature}; it has to be a number above 0")
        for task, weight in self.task_weights.items():
            if not 0 <= weight < math.inf:
                raise UserError(f"data.task_weights.{task} is {weight}; it has to be a number of at least 0")

    def _check_template(self) -> None:
        is_template = self.prompt is not None
        if self.format == "template" and not is_template:
            raise UserError("data.format is 'template', but data.prompt is not set; write it, with {field} for a field")
        if is_template and self.format not in ("auto", "template"):
            raise UserError(f"data.prompt is set, but data.format is '{self.format}'; use 'template' or leave one out")
        if is_template and bool(self.choices) == (self.completion is not None):
            raise UserError("data.prompt needs either data.choices or data.completion beside it, and not both")
        if not is_template and (self.choices or self.completion is not None):
            raise UserError("data.choices and data.completion need data.prompt; write the prompt's template")
        if self.second is not None and not self.choices:
            raise UserError("data.second is the other text of a pair that is classified; it needs data.choices")
        if len(self.choices) == 1:
            raise UserError(f"data.choices has only one option, {self.choices[0]!r}; give at least two")

    def sources(self, split: Split) -> tuple[str, ...]:
        """Return the sources of `split`.

        Raises:
            UserError: none is set.
        """
        chosen = self.train if split == "train" or self.test_share else self.test
        if not chosen:
            raise UserError(f"data.{split} is not set; give a file, a hub id, builtin:NAME or benchmark:FOLDER/FILE")
        return (chosen,) if isinstance(chosen, str) else tuple(chosen)

    @property
    def has_test(self) -> bool:
        """Whether there are rows for evaluation."""
        return self.test is not None or self.test_share > 0

    @property
    def group_and_number(self) -> tuple[int, int] | None:
        """The group of prompts that is wanted, from 1, and the number of groups; None for all rows."""
        return None if self.group is None else _parse_group(self.group)

    @property
    def is_weighted(self) -> bool:
        """Whether tasks get other shares of the training rows than their own."""
        return bool(self.task_weights) or self.task_temperature != 1

    def limit(self, split: Split) -> int | None:
        """Return how many rows of each source of `split` are wanted, or None for all."""
        return self.max_train if split == "train" else self.max_test


def _parse_group(text: str) -> tuple[int, int]:
    wanted, slash, number = text.partition("/")
    if slash and wanted.isdecimal() and number.isdecimal() and 1 <= int(wanted) <= int(number) >= 2:
        return int(wanted), int(number)
    raise UserError(f"data.group is '{text}'; write the group and the number of groups, such as 2/3")
