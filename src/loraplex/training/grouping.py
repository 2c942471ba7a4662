"""Rows of one group of prompts: k-means over the prompts to train on, every other row in the group it is nearest to."""

from __future__ import annotations

from collections.abc import Sequence

from loraplex.data import DataOptions, Example
from loraplex.errors import UserError


def of_one_group(
    options: DataOptions, train: Sequence[Example], validation: Sequence[Example], test: Sequence[Example]
) -> tuple[list[Example], list[Example], list[Example]]:
    """Return those rows of the three kinds that are in the group `options.group`; no answer is looked at.

    Raises:
        UserError: when the training rows have too few different prompts for that many groups.
    """
    assert options.group_and_number is not None
    wanted, number = options.group_and_number
    kinds = (train, validation, test)
    labels = _labels(train, kinds, number, options.seed)
    kept = [
        [row for row, label in zip(rows, of_rows, strict=True) if label == wanted - 1]
        for rows, of_rows in zip(kinds, labels, strict=True)
    ]
    if not kept[0]:
        raise UserError(f"data.group {options.group}: no training row is in it, try fewer groups")
    return kept[0], kept[1], kept[2]


def group_sizes(train: Sequence[Example], number: int, seed: int) -> list[int]:
    """Return how many training rows are in each of `number` groups."""
    (labels,) = _labels(train, (train,), number, seed)
    return [labels.count(group) for group in range(number)]


def number_of_groups(train: Sequence[Example], seed: int) -> tuple[int, str]:
    """Return how many groups `loraplex heads` suggests for the rows, and why."""
    from loraplex.analysis.clustering import group_texts

    found = group_texts([row.asked for row in train], seed=seed)
    return found.number, found.reason


def _labels(train: Sequence[Example], kinds: Sequence[Sequence[Example]], number: int, seed: int) -> list[list[int]]:
    """Return the group of every row of each kind, counted from 0 for the largest."""
    from loraplex.analysis.clustering import group_texts

    found = group_texts([row.asked for row in train], least=number, most=number, seed=seed)
    if found.number < number:
        raise UserError(f"the prompts of the training rows fall into {found.number} groups, not into {number}")
    return [found.group_of([row.asked for row in rows]).tolist() if rows else [] for rows in kinds]
