"""Accuracies, their standard errors, and the share to beat."""

import math

import pytest

from loraplex.data import Example
from loraplex.evaluation.batches import length_batches
from loraplex.evaluation.results import Accuracies, Accuracy, majority_share


def test_accuracy_has_the_binomial_standard_error() -> None:
    accuracy = Accuracy.of([True] * 30 + [False] * 70)
    assert accuracy == Accuracy(0.3, pytest.approx(math.sqrt(0.21 / 100)), 100)  # type: ignore[arg-type]
    assert str(accuracy) == "0.300 ± 0.046"


def test_every_task_counts_the_same_in_the_mean() -> None:
    found = Accuracies.of([True, True, True, False, False, True], ["a", "a", "a", "a", "b", "b"])
    assert found.overall.value == pytest.approx(4 / 6)
    assert list(found.per_task) == ["a", "b"]
    assert found.macro.value == pytest.approx((0.75 + 0.5) / 2)
    errors = [task.standard_error for task in found.per_task.values()]
    assert found.macro.standard_error == pytest.approx(math.hypot(*errors) / 2)


def test_the_most_frequent_answer_is_a_tasks_own() -> None:
    options = [Example("p", " x", (" x", " y"), answer, task="a") for answer in (0, 0, 1)]
    written = [Example("p", text, task="b") for text in ("yes", "no", "no", "no")]
    assert majority_share(options) == pytest.approx(2 / 3)
    assert majority_share([*options, *written]) == pytest.approx((2 + 3) / 7)


def test_batches_hold_every_item_once_and_keep_the_limits() -> None:
    lengths = [5, 1, 9, 3, 3, 40, 2]
    batches = list(length_batches(lengths, batch_size=3, most_tokens=20))
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    for batch in batches:
        assert len(batch) <= 3
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 20
    assert batches[0] == [5]
