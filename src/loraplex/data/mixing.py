"""How rows are divided: items for training and for testing by their text, tasks by weight."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence

from loraplex.data.examples import Example
from loraplex.data.options import DataOptions, Split
from loraplex.errors import UserError, nearest


def is_held_out(example: Example, share: float, seed: int) -> bool:
    """Return whether an item is one of the share that is for testing: by a hash of its prompt and the seed.

    The same item is on the same side wherever it stands, twice too, and whatever rows are added or left out.
    """
    prompt = example.prompt if isinstance(example.prompt, str) else repr(example.prompt)
    digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def one_side(examples: Sequence[Example], options: DataOptions, split: Split, source: str) -> list[Example]:
    """Return the examples of a source that `data.test_share` gives to `split`.

    Raises:
        UserError: when there is none.
    """
    wanted = split == "test"
    kept = [example for example in examples if is_held_out(example, options.test_share, options.seed) is wanted]
    if not kept:
        raise UserError(
            f"{source}: data.test_share {options.test_share} of {len(examples)} rows leaves none to {split}: change it"
        )
    return kept


def a_few_of_each_task(examples: Sequence[Example], most: int, seed: int) -> list[Example]:
    """Return a seeded sample of at most `most` examples of each task, in their order."""
    kept: list[int] = []
    for task, rows in _by_task(examples).items():
        kept += rows if len(rows) <= most else random.Random(f"{seed}:{task}").sample(rows, most)
    return [examples[index] for index in sorted(kept)]


def by_weight(
    examples: Sequence[Example], weights: Mapping[str, float], temperature: float, count: int, seed: int
) -> list[Example]:
    """Return `count` examples in which task t has the share w_t · n_t^(1/T) / Σ_u w_u · n_u^(1/T).

    n_t is its number of examples, w_t its weight (1 where `weights` names none), T the temperature: 1 keeps the tasks'
    own shares, ∞ gives every task the same. An example comes twice only when all of its task have come once.

    Raises:
        UserError: a weight names no task, or nothing is left.
    """
    rows = _by_task(examples)
    for task in weights:
        if task not in rows:
            hint = nearest(task, rows) or f" The tasks are {', '.join(sorted(rows))}."
            raise UserError(f"data.task_weights names the task '{task}', which no training row has.{hint}")
    sizes = {task: weights.get(task, 1.0) * len(indices) ** (1 / temperature) for task, indices in rows.items()}
    if not any(sizes.values()):
        raise UserError("data.task_weights is 0 for every task: nothing is left to train on")
    drawn: list[int] = []
    for task, wanted in _apportion(sizes, count).items():
        whole, rest = divmod(wanted, len(rows[task]))
        drawn += rows[task] * whole + random.Random(f"{seed}:{task}").sample(rows[task], rest)
    return [examples[index] for index in sorted(drawn)]


def _apportion(sizes: Mapping[str, float], count: int) -> dict[str, int]:
    """Return whole numbers in the proportions of `sizes` that add up to `count` (largest remainders)."""
    total = sum(sizes.values())
    exact = {task: count * size / total for task, size in sizes.items()}
    shares = {task: math.floor(value) for task, value in exact.items()}
    missing = count - sum(shares.values())
    for task in sorted(exact, key=lambda task: shares[task] - exact[task])[:missing]:
        shares[task] += 1
    return shares


def _by_task(examples: Sequence[Example]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        rows.setdefault(example.task, []).append(index)
    return rows
