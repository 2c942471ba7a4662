"""Items on one side of a split, a few of every task, and tasks by weight."""

import collections
import json
import math
from pathlib import Path
from typing import Any

import pytest

from loraplex.data import DataOptions, Example, read_examples
from loraplex.data.mixing import by_weight, is_held_out
from loraplex.errors import UserError


def tasks(*sizes: int) -> list[Example]:
    return [
        Example(f"{task} {number}", "x", task=task)
        for task, size in zip("abc", sizes, strict=False)
        for number in range(size)
    ]


def count(examples: list[Example]) -> dict[str, int]:
    return dict(collections.Counter(example.task for example in examples))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """300 rows of task a and 100 of task b; every tenth prompt of a stands twice."""
    path = tmp_path / "rows.jsonl"
    found = [{"prompt": f"a {n - n % 10 if n % 10 == 9 else n}", "completion": "x", "task": "a"} for n in range(300)]
    found += [{"prompt": f"b {n}", "completion": "y", "task": "b"} for n in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_the_sides_of_a_split_share_no_item_and_hold_every_row(rows: Path) -> None:
    options = DataOptions(train=str(rows), test_share=0.25)
    train, test = read_examples(options, "train"), read_examples(options, "test")
    assert not {example.prompt for example in train} & {example.prompt for example in test}
    assert sorted(example.source for example in [*train, *test]) == sorted(f"{rows}:{n}" for n in range(1, 401))
    # four standard deviations of a binomial
    assert abs(len(test) - 100) < 4 * math.sqrt(400 * 0.25 * 0.75)
    assert count(test).keys() == {"a", "b"}


def test_the_side_of_an_item_depends_on_nothing_but_its_text_and_the_seed(rows: Path, tmp_path: Path) -> None:
    test = {example.prompt for example in read_examples(DataOptions(train=str(rows), test_share=0.25), "test")}
    half = tmp_path / "half.jsonl"
    half.write_text("".join(reversed(rows.read_text().splitlines(keepends=True)[::2])))
    of_half = {example.prompt for example in read_examples(DataOptions(train=str(half), test_share=0.25), "test")}
    assert of_half <= test
    assert of_half
    other = {example.prompt for example in read_examples(DataOptions(train=str(rows), test_share=0.25, seed=1), "test")}
    assert other != test
    assert is_held_out(Example("p", "x"), 0.999999, 0)
    assert not is_held_out(Example("p", "x"), 0.000001, 0)


def test_a_few_of_every_task(rows: Path) -> None:
    options = DataOptions(train=str(rows), test=str(rows), max_test_per_task=30)
    assert count(read_examples(options, "test")) == {"a": 30, "b": 30}
    assert count(read_examples(options, "train")) == {"a": 300, "b": 100}


@pytest.mark.parametrize(
    ("weights", "temperature", "expected"),
    [
        ({}, 1.0, {"a": 60, "b": 30, "c": 10}),
        ({"c": 3.0}, 1.0, {"a": 50, "b": 25, "c": 25}),
        ({"a": 0}, 1.0, {"b": 75, "c": 25}),
        ({}, 1e9, {"a": 34, "b": 33, "c": 33}),
        ({}, 2.0, {"a": 47, "b": 34, "c": 19}),
    ],
)
def test_tasks_by_weight(weights: dict[str, float], temperature: float, expected: dict[str, int]) -> None:
    found = by_weight(tasks(60, 30, 10), weights, temperature, 100, seed=0)
    assert count(found) == expected
    assert found == by_weight(tasks(60, 30, 10), weights, temperature, 100, seed=0)


def test_a_row_comes_twice_only_after_all_of_its_task() -> None:
    found = by_weight(tasks(60, 30, 10), {"c": 3}, 1.0, 100, seed=0)
    times = collections.Counter(example.prompt for example in found if example.task == "c")
    assert sorted(times.values()) == [2] * 5 + [3] * 5
    assert max(collections.Counter(example.prompt for example in found if example.task != "c").values()) == 1


def test_weights_are_of_the_rows_that_a_limit_leaves(rows: Path) -> None:
    options = DataOptions(train=str(rows), max_train=40, task_weights={"b": 3.0})
    found = read_examples(options, "train")
    assert count(found) == {"a": 20, "b": 20}
    # drawn from all rows, not from a sample of forty with ten of b
    assert len({example.source for example in found}) == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_share": 1.0}, "data.test_share is 1.0"),
        ({"test_share": 0.2, "test": "rows.jsonl"}, "but data.test names some"),
        ({"task_temperature": 0.0}, "data.task_temperature is 0.0"),
        ({"task_weights": {"a": -1.0}}, "data.task_weights.a is -1.0"),
        ({"max_test_per_task": 0}, "data.max_test_per_task is 0"),
    ],
)
def test_shares_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        DataOptions(train="rows.jsonl", **options)
    assert message in str(raised.value)


def test_weights_of_no_task(rows: Path) -> None:
    with pytest.raises(UserError, match=r"names the task 'aa', which no training row has\. Did you mean 'a'\?"):
        read_examples(DataOptions(train=str(rows), task_weights={"aa": 2.0}), "train")
    with pytest.raises(UserError, match="is 0 for every task"):
        read_examples(DataOptions(train=str(rows), task_weights={"a": 0.0, "b": 0.0}), "train")


def test_shares_that_leave_nothing(rows: Path) -> None:
    with pytest.raises(UserError, match=r"data\.test_share 1e-06 of 400 rows leaves none to test"):
        read_examples(DataOptions(train=str(rows), test_share=1e-6), "test")
    with pytest.raises(UserError, match="has rows of its own for evaluation"):
        read_examples(DataOptions(train="builtin:syllogism", test_share=0.2), "train")
