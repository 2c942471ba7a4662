"""Rows of one group of prompts: k-means over the prompts to train on, every other row in the group it is nearest to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraplex.data import DataOptions, Example
from loraplex.errors import UserError

if TYPE_CHECKING:
    from loraplex.data.clustering import Grouping


def of_one_group(
    options: DataOptions, train: Sequence[Example], validation: Sequence[Example], test: Sequence[Example]
) -> tuple[list[Example], list[Example], list[Example]]:
    """Return those rows of the three kinds that are in the group `options.group`; no answer is looked at.

    Raises:
        UserError: when the training rows have too few different prompts for that many groups.
    """
    assert options.group_and_number is not None
    wanted, number = options.group_and_number
    found = find_groups(train, number, options.seed)

    def kept(rows: Sequence[Example]) -> list[Example]:
        return [row for row, label in zip(rows, _labels(found, rows), strict=True) if label == wanted - 1]

    if not (ours := kept(train)):
        raise UserError(f"data.group {options.group}: no training row is in it, try fewer groups")
    return ours, kept(validation), kept(test)


def find_groups(train: Sequence[Example], number: int | None, seed: int) -> Grouping:
    """Return the groups of the training rows' prompts, so many or as many as `loraplex heads` suggests.

    Raises:
        UserError: when the training rows have too few different prompts for that many groups.
    """
    from loraplex.data.clustering import group_texts

    texts = [row.asked for row in train]
    if number is None:
        return group_texts(texts, seed=seed)
    found = group_texts(texts, least=number, most=number, seed=seed)
    if found.number < number:
        raise UserError(f"the prompts of the training rows fall into {found.number} groups, not into {number}")
    return found


def group_sizes(found: Grouping, train: Sequence[Example]) -> list[int]:
    """Return how many of the training rows are in each group."""
    labels = _labels(found, train)
    return [labels.count(group) for group in range(found.number)]


def _labels(found: Grouping, rows: Sequence[Example]) -> list[int]:
    """Return the group of every row, counted from 0 for the largest."""
    return found.group_of([row.asked for row in rows]).tolist() if rows else []
