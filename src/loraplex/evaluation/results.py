"""What an evaluation says: accuracies with standard errors, the share to beat, and records of single items."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraplex.data.examples import Example
from loraplex.files import write_atomically


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers p among n items, with its standard error sqrt(p (1 − p) / n)."""

    value: float
    standard_error: float
    items: int

    @classmethod
    def of(cls, correct: Sequence[bool]) -> Accuracy:
        """Return the accuracy over `correct`, which must not be empty."""
        assert correct, "an accuracy needs items"
        share = sum(correct) / len(correct)
        return cls(share, math.sqrt(share * (1 - share) / len(correct)), len(correct))

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True)
class Accuracies:
    """The accuracy over all items, for each task, and the mean over tasks in which every task counts the same."""

    overall: Accuracy
    # In the order in which the tasks first appear.
    per_task: Mapping[str, Accuracy]
    # Its standard error is sqrt(sum of squared standard errors) / number of tasks.
    macro: Accuracy

    @classmethod
    def of(cls, correct: Sequence[bool], tasks: Sequence[str]) -> Accuracies:
        """Return the accuracies of items that are `correct` or not and belong to `tasks`, in the same order."""
        groups: dict[str, list[bool]] = defaultdict(list)
        for is_correct, task in zip(correct, tasks, strict=True):
            groups[task].append(is_correct)
        per_task = {task: Accuracy.of(group) for task, group in groups.items()}
        mean = sum(task.value for task in per_task.values()) / len(per_task)
        error = math.sqrt(sum(task.standard_error**2 for task in per_task.values())) / len(per_task)
        return cls(Accuracy.of(correct), per_task, Accuracy(mean, error, len(correct)))


def majority_share(examples: Sequence[Example]) -> float:
    """Return the accuracy of always giving a task's most frequent answer, which a model gets without any skill.

    The answer is the index of the right option, or for rows without options the completion.
    """
    answers: dict[str, Counter[int | str]] = defaultdict(Counter)
    for example in examples:
        answers[example.task][example.completion if example.answer is None else example.answer] += 1
    return sum(max(counts.values()) for counts in answers.values()) / len(examples)


def write_records(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object a line."""
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
