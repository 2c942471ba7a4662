"""Accuracy and F1 of a classification head, by hand."""

import pytest

from loraplex.evaluation.classes import ClassItem, ClassScores


def scores(classes: tuple[str, ...], pairs: list[tuple[int, int]]) -> ClassScores:
    """Items as (right class, chosen class)."""
    rows = [tuple(0.0 if index == chosen else -1.0 for index in range(len(classes))) for _, chosen in pairs]
    return ClassScores(classes, tuple(ClassItem("s", "", a, row) for (a, _), row in zip(pairs, rows, strict=True)))


def test_f1_of_two_classes_is_that_of_the_second() -> None:
    # of class 1: three right, one taken for 0, two others taken for it
    found = scores(("no", "yes"), [(1, 1)] * 3 + [(1, 0)] + [(0, 1)] * 2 + [(0, 0)] * 4)
    assert found.f1() == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    assert found.accuracies().overall.value == 0.7
    assert [record["correct"] for record in found.records()] == [True] * 3 + [False] * 3 + [True] * 4


def test_f1_of_more_classes_is_their_mean() -> None:
    found = scores(("a", "b", "c"), [(0, 0), (0, 1), (1, 1), (2, 0)])
    assert found.f1() == pytest.approx((2 / (2 + 1 + 1) + 2 / (2 + 1) + 0) / 3)


def test_f1_is_zero_where_nothing_is_found() -> None:
    assert scores(("no", "yes"), [(0, 0), (0, 0)]).f1() == 0.0
