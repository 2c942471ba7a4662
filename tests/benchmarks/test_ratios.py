"""The interval of a median, and what counts as reaching a goal."""

import pytest
from benchmarks.ratios import judged, median_interval


def test_nine_rounds_are_bounded_by_the_second_and_the_eighth() -> None:
    found = median_interval([9, 1, 8, 2, 7, 3, 6, 4, 5])
    assert (found.low, found.median, found.high) == (2, 5, 8)
    # 1 − 2·(1 + 9)/2⁹
    assert found.coverage == pytest.approx(0.9609375)


def test_the_interval_is_the_narrowest_that_covers() -> None:
    found = median_interval(range(1, 101))
    assert (found.low, found.high) == (40, 61)
    assert 0.95 <= found.coverage < 0.97


def test_too_few_rounds_say_what_they_cover() -> None:
    found = median_interval([3.0, 1.0, 2.0])
    assert (found.low, found.median, found.high, found.coverage) == (1.0, 2.0, 3.0, 0.75)


@pytest.mark.parametrize(
    ("ratios", "quantity", "goal", "ahead", "reached"),
    [
        ([2.0] * 9, "speed", 1.9, True, True),
        ([1.889, 1.889, *[1.95] * 7], "speed", 1.9, True, True),
        ([1.87, 1.87, *[1.95] * 7], "speed", 1.9, True, False),
        ([0.5], "memory", 0.6, True, True),
        ([1.1] * 9, "time", 1.08, False, False),
        ([0.9] * 9, "speed", None, False, None),
    ],
)
def test_verdicts(ratios: list[float], quantity: str, goal: float | None, ahead: bool, reached: bool | None) -> None:
    entry = judged(ratios, quantity, goal)
    assert (entry["ahead"], entry["reached"]) == (ahead, reached)
