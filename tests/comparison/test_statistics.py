"""The statistics of a comparison against hand-made values, naive loops, scipy, statsmodels and known truths."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from benchmarks.power import Truth, simulate
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from loraplex.comparison.paired import (
    Array,
    Estimate,
    MeanSquares,
    Spread,
    detectable,
    detectable_with_one_seed,
    random_effects_p_value,
)
from loraplex.comparison.results import Arm, Comparison, Item, Run
from loraplex.comparison.sentences import size_sentence, verdict_sentence
from loraplex.comparison.statistics import expected_detectable, summarize
from loraplex.errors import UserError


def arm(name: str, correct: object, seeds: Sequence[int] | None = None, failed: Sequence[int] = ()) -> Arm:
    """An arm whose answers are `correct`, (seeds, items)."""
    answers = np.asarray(correct, dtype=bool)
    runs = [
        Run(
            seed=seed,
            state="finished",
            command="",
            items=[Item(f"row {row}", "", bool(right)) for row, right in enumerate(by_item)],
        )
        for seed, by_item in zip(seeds or range(len(answers)), answers, strict=True)
    ]
    runs += [Run(seed=seed, state="failed", command="", error="out of memory") for seed in failed]
    return Arm(name, name, 1e-3, 1, True, runs)


def comparison(*arms: Arm, seeds: Sequence[int] = (0, 1, 2)) -> Comparison:
    return Comparison("c", "", "", "m", "r", "none", None, arms[0].name, list(seeds), list(arms), None)


def answers(generator: np.random.Generator, accuracy: float, seeds: int = 3, items: int = 200) -> Array:
    return (generator.random((seeds, items)) < accuracy).astype(float)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def naive_mean_squares(y: Array) -> tuple[float, float, float]:
    seeds, items = y.shape
    mean = sum(y[s, i] for s in range(seeds) for i in range(items)) / (seeds * items)
    by_seed = [sum(y[s, i] for i in range(items)) / items for s in range(seeds)]
    by_item = [sum(y[s, i] for s in range(seeds)) / seeds for i in range(items)]
    rest = sum((y[s, i] - by_seed[s] - by_item[i] + mean) ** 2 for s in range(seeds) for i in range(items))
    return (
        items * sum((value - mean) ** 2 for value in by_seed) / (seeds - 1),
        seeds * sum((value - mean) ** 2 for value in by_item) / (items - 1),
        rest / ((seeds - 1) * (items - 1)),
    )


def test_mean_squares_are_those_of_naive_loops_and_of_statsmodels(generator: np.random.Generator) -> None:
    import pandas as pd
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    y = generator.integers(-1, 2, (3, 7)).astype(float)
    squares = MeanSquares.of(y)
    found = [float(squares.seeds), float(squares.items), float(squares.residual)]
    assert found == pytest.approx(naive_mean_squares(y))
    long = pd.DataFrame([{"y": y[s, i], "seed": s, "item": i} for s in range(3) for i in range(7)])
    table = anova_lm(ols("y ~ C(seed) + C(item)", long).fit())
    assert found == pytest.approx(table["mean_sq"].tolist())


def test_the_test_is_that_of_naive_loops(generator: np.random.Generator) -> None:
    several = np.stack([answers(generator, 0.8, 4, 30) - answers(generator, 0.6, 4, 30) for _ in range(5)])
    p_values = random_effects_p_value(several)
    for pairs, p_value in zip(several, p_values, strict=True):
        s, t, e = naive_mean_squares(pairs)
        total = max(s, e) + max(t - e, 0)
        freedom = min(total**2 / (s**2 / 3 + max(t, e) ** 2 / 29), 12)
        expected = 2 * stats.t.sf(abs(pairs.mean()) / (total / 120) ** 0.5, freedom)
        assert p_value == pytest.approx(expected)
        estimate = Estimate.of(pairs, 1)
        half = stats.t.ppf(0.975, freedom) * (total / 120) ** 0.5
        assert estimate.p_value == pytest.approx(expected)
        assert estimate.interval == pytest.approx((pairs.mean() - half, pairs.mean() + half))


def test_when_only_seeds_differ_it_is_students_t_over_the_seeds() -> None:
    # Every item of a seed is won or tied by chance, the same share of them in another order: no item is special.
    generator = np.random.default_rng(3)
    shares = [0.30, 0.10, 0.18, 0.05]
    pairs = np.stack([generator.permutation(np.arange(4000) < share * 4000).astype(float) for share in shares])
    assert float(Spread.of(pairs).persistent) < 0.002
    reference = stats.ttest_1samp(pairs.mean(axis=1), 0)
    assert float(random_effects_p_value(pairs)) == pytest.approx(reference.pvalue, rel=0.02)
    assert Estimate.of(pairs, 1).interval == pytest.approx(reference.confidence_interval(), rel=0.02)


def test_the_variance_is_never_below_that_of_the_items_alone(generator: np.random.Generator) -> None:
    pairs = np.stack([generator.permutation([1.0] * 30 + [-1.0] * 10 + [0.0] * 160) for _ in range(3)])
    spread = Spread.of(pairs)
    assert float(spread.seeds) == pytest.approx(0)
    items_alone = pairs.mean(axis=0).var(ddof=1) / 200
    assert float(spread.variance(3)) >= items_alone
    assert float(spread.degrees_of_freedom(3)) == 8


def test_one_seed_is_mcnemars_exact_test() -> None:
    pairs = np.array([[1.0] * 15 + [-1.0] * 4 + [0.0] * 81])
    estimate = Estimate.of(pairs, 1)
    assert estimate.p_value == pytest.approx(stats.binomtest(4, 19, 0.5).pvalue)
    assert estimate.difference == pytest.approx(0.11)
    # Agresti and Min: (15 − 4) / 102 ± 1.96 √(20 − 11² / 102) / 102.
    # Clopper and Pearson: .19 (2 (.5443, .9395) − 1).
    assert estimate.interval == pytest.approx((0.0168, 0.1912), abs=2e-4)
    assert (estimate.seeds_needed, estimate.items_needed) == (None, None)


def test_with_one_seed_the_interval_leaves_out_zero_exactly_where_p_is_below_the_level() -> None:
    for won, lost in itertools.product(range(0, 25, 2), range(12)):
        pairs = np.array([[1.0] * won + [-1.0] * lost + [0.0] * (60 - won - lost)])
        estimate = Estimate.of(pairs, 1)
        assert (estimate.interval[0] > 0 or estimate.interval[1] < 0) == (estimate.p_value < 0.05), (won, lost)


def test_seeds_that_agree_count_as_one() -> None:
    once = np.array([[1.0] * 12 + [-1.0] * 2 + [0.0] * 86])
    one, three = Estimate.of(once, 1), Estimate.of(np.repeat(once, 3, axis=0), 1)
    assert three.p_value == one.p_value
    assert three.interval == one.interval
    assert three.items_needed is not None
    assert detectable_with_one_seed(three.items_needed, 0.14, 1) <= 0.01
    assert detectable_with_one_seed(three.items_needed - 1, 0.14, 1) > 0.01


def test_identical_arms(generator: np.random.Generator) -> None:
    same = answers(generator, 0.8)
    contrast = summarize(comparison(arm("lora", same), arm("dora", same))).contrasts[0]
    assert (contrast.difference, contrast.p_value, contrast.verdict) == (0, 1, "open")
    assert contrast.interval == pytest.approx((-0.0097, 0.0097), abs=1e-4)
    assert "difference 0.0 points, 95 % interval −1.0 to 1.0" in contrast.sentence


def test_one_item_decides_nothing() -> None:
    summary = summarize(comparison(arm("lora", [[0], [0], [0]]), arm("dora", [[1], [1], [1]])))
    contrast = summary.contrasts[0]
    assert (contrast.p_value, contrast.interval, contrast.verdict) == (1, (-1, 1), "open")
    assert "one item cannot show a difference" in contrast.sentence
    assert expected_detectable(1, 3, 1) == 1


def test_arms(generator: np.random.Generator) -> None:
    correct = answers(generator, 0.7)
    several, single = summarize(comparison(arm("lora", correct), arm("dora", correct[:1]))).arms
    means = correct.mean(axis=1)
    assert (several.seeds, several.mean) == (3, pytest.approx(means.mean()))
    assert several.between_seeds == pytest.approx(np.std(means, ddof=1))
    assert several.interval == pytest.approx(stats.t.interval(0.95, 2, means.mean(), stats.sem(means)))
    assert several.standard_error == pytest.approx(correct.mean(axis=0).std() / 200**0.5)
    assert (single.interval, single.between_seeds) == (None, None)
    share = correct[0].mean()
    assert single.standard_error == pytest.approx((share * (1 - share) / 200) ** 0.5)


def test_p_values_are_corrected_by_holms_method(generator: np.random.Generator) -> None:
    arms = [arm(f"arm {i}", answers(generator, accuracy)) for i, accuracy in enumerate((0.6, 0.62, 0.7, 0.95, 0.3))]
    contrasts = summarize(comparison(*arms)).contrasts
    ordered = sorted(contrasts, key=lambda contrast: contrast.p_value)
    largest = 0.0
    for rank, contrast in enumerate(ordered):
        largest = max(largest, min((len(ordered) - rank) * contrast.p_value, 1))
        assert contrast.adjusted_p_value == pytest.approx(largest)
        assert (contrast.verdict != "open") == (contrast.adjusted_p_value < 0.05)
    assert {contrast.verdict for contrast in contrasts} == {"better", "worse", "open"}
    assert all(contrast.reference == "arm 0" for contrast in contrasts)


def test_the_other_way_round_it_is_the_same(generator: np.random.Generator) -> None:
    lora, dora = arm("lora", answers(generator, 0.6)), arm("dora", answers(generator, 0.8))
    there, back = (summarize(comparison(*arms)).contrasts[0] for arms in ((lora, dora), (dora, lora)))
    assert (there.verdict, back.verdict) == ("better", "worse")
    assert there.difference == -back.difference
    assert there.p_value == back.p_value
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]))


def test_only_seeds_that_both_have_finished_are_compared(generator: np.random.Generator) -> None:
    reference, other = answers(generator, 0.7), answers(generator, 0.75)
    part = summarize(
        comparison(arm("lora", reference), arm("dora", other[:2], seeds=(2, 0), failed=(1,)), arm("xs", other[:1]))
    )
    first, second = part.contrasts
    assert (first.seeds, second.seeds) == (2, 1)
    assert first.difference == pytest.approx((other[:2] - reference[[2, 0]]).mean())
    assert "on 2 of 3 seeds" in first.sentence
    assert "on 1 of 3 seeds" in second.sentence
    assert "one seed says nothing about others" in second.sentence
    assert part.beforehand.startswith("With 1 to 2 seeds and 200 items a difference of about ")
    assert part.beforehand.endswith(" Arms with one seed stay open: one seed says nothing about others.")
    assert [statistics.seeds for statistics in part.arms] == [3, 2, 1]


def test_arms_that_take_no_part_are_named(generator: np.random.Generator) -> None:
    correct = answers(generator, 0.7, seeds=2)
    summary = summarize(
        comparison(
            arm("lora", correct),
            arm("gone", np.empty((0, 5)), failed=(0, 1)),
            arm("other seeds", correct, seeds=(5, 6)),
        )
    )
    assert summary.contrasts == []
    assert [statistics.arm for statistics in summary.arms] == ["lora", "other seeds"]
    assert summary.beforehand == (
        "Nothing can be compared: no two arms have finished the same seed. gone is left out: none of its runs has "
        "finished. other seeds is left out: it shares no finished seed with lora."
    )


def test_a_reference_without_finished_runs(generator: np.random.Generator) -> None:
    summary = summarize(comparison(arm("lora", np.empty((0, 5)), failed=(0,)), arm("dora", answers(generator, 0.7))))
    assert summary.contrasts == []
    assert [statistics.arm for statistics in summary.arms] == ["dora"]
    assert "lora is left out: none of its runs has finished." in summary.beforehand
    assert "dora" not in summary.beforehand


def test_a_single_arm(generator: np.random.Generator) -> None:
    summary = summarize(comparison(arm("lora", answers(generator, 0.7))))
    assert summary.contrasts == []
    assert summary.beforehand == "Nothing can be compared: there is only one arm."


def test_different_items_are_refused_by_the_names_of_the_arms() -> None:
    with pytest.raises(UserError, match="'dora' with seed 4 was tested on other items than 'lora' with seed 0"):
        summarize(comparison(arm("lora", [[1, 0, 1]]), arm("dora", [[1, 0]], seeds=(4,))))


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 12)).flatmap(
        lambda shape: st.tuples(hnp.arrays(bool, shape), hnp.arrays(bool, shape))
    )
)
def test_whatever_the_answers_are(both: tuple[Array, Array]) -> None:
    summary = summarize(comparison(arm("lora", both[0]), arm("dora", both[1])))
    contrast = summary.contrasts[0]
    assert 0 <= contrast.p_value <= contrast.adjusted_p_value <= 1
    assert -1 <= contrast.interval[0] <= contrast.difference <= contrast.interval[1] <= 1
    assert (contrast.verdict == "open") == (contrast.seeds == 1 or contrast.adjusted_p_value >= 0.05)
    assert 0 < contrast.detectable <= 1
    assert "nan" not in contrast.sentence + summary.beforehand
    assert contrast.sentence.endswith(".")


def test_sentences() -> None:
    def told(difference: float, interval: tuple[float, float], p_value: float, contrasts: int, **others: object) -> str:
        fields = {"seeds": 3, "items": 500, "detectable": 0.04, "seeds_needed": 15, "items_needed": None} | others
        estimate = Estimate(difference=difference, interval=interval, p_value=p_value, **fields)
        return verdict_sentence("dora", "lora", estimate, p_value, contrasts, planned_seeds=3)

    assert told(0.021, (0.004, 0.038), 0.02, 3) == (
        "dora is better than lora by 2.1 points (95 % interval 0.4 to 3.8, p = .02 corrected for 3 arms)."
    )
    assert told(-0.021, (-0.038, -0.004), 0.0002, 1, seeds=1) == (
        "dora against lora is open on 1 of 3 seeds (difference −2.1 points, 95 % interval −3.8 to −0.4 over the items "
        "alone); one seed says nothing about others."
    )
    assert told(0.004, (-0.016, 0.024), 0.68, 3) == (
        "dora cannot be told apart from lora at this size (difference +0.4 points, 95 % interval −1.6 to 2.4); about "
        "12 more seeds would be needed to see 1 point."
    )
    assert "(difference −1.0 points, 95 % interval −1.9 to −0.1, p = .081 corrected for 2 arms)" in told(
        -0.01, (-0.019, -0.001), 0.081, 2
    )
    assert told(0.0, (-0.01, 0.01), 1.0, 1, seeds_needed=3).endswith(
        "; a difference of 1 point would probably have been seen."
    )
    assert told(0.0, (-0.01, 0.01), 1.0, 1, seeds_needed=None, items_needed=1234).endswith(
        "; seeds alone cannot show 1 point, it takes at least 1,300 items."
    )
    assert "p < .05" in told(0.02, (0.001, 0.04), 0.04999, 1)
    assert "p ≥ .05" in told(0.02, (0.001, 0.04), 0.05, 1)
    assert size_sentence(872, [3], 3, [0.034]) == (
        "With 3 seeds and 872 items a difference of about 3.4 points could be detected (80 % power, 5 % level, "
        "corrected for 3 contrasts)."
    )
    assert size_sentence(1, [2], 1, [0.5, 0.51]).startswith(
        "With 2 seeds and 1 item a difference of about 50.0 to 51.0 points, depending on the arm, could"
    )
    assert size_sentence(1, [1, 1], 1, []) == (
        "With 1 seed and 1 item nothing can be decided, however large a difference is: one seed says nothing about "
        "others."
    )


def test_one_seed_decides_nothing_however_large_the_difference() -> None:
    right, wrong = np.ones((1, 400)), np.zeros((1, 400))
    summary = summarize(comparison(arm("lora", wrong), arm("dora", right), arm("xs", wrong), seeds=(0,)))
    assert summary.contrasts[0].adjusted_p_value < 1e-100
    assert {contrast.verdict for contrast in summary.contrasts} == {"open"}
    told = " ".join([summary.beforehand, *(contrast.sentence for contrast in summary.contrasts)])
    assert not {"better", "worse", "detected"} & set(told.replace(",", " ").split())
    assert "p <" not in told


def test_seeds_needed_are_the_fewest_that_detect_one_point(generator: np.random.Generator) -> None:
    pairs = simulate(Truth(persistent=0.02, between_seeds=(0.01, 0.01)), 1, 5, 2000, generator)[0]
    estimate, spread = Estimate.of(pairs, 2), Spread.of(pairs)
    assert estimate.seeds_needed is not None
    assert detectable(spread, estimate.seeds_needed, 2) <= 0.01 < detectable(spread, estimate.seeds_needed - 1, 2)
    assert estimate.items_needed is None


def test_where_items_forbid_it_no_number_of_seeds_is_enough(generator: np.random.Generator) -> None:
    pairs = simulate(Truth(persistent=0.6), 1, 3, 300, generator)[0]
    estimate = Estimate.of(pairs, 1)
    assert estimate.seeds_needed is None
    # (1.96 + .8416)² σ² / .01²
    expected = 7.849 * float(Spread.of(pairs).persistent) / 1e-4
    assert estimate.items_needed == pytest.approx(expected, rel=1e-3)


def test_more_seeds_items_and_fewer_arms_detect_less() -> None:
    assert expected_detectable(500, 5, 1) < expected_detectable(500, 3, 1) < expected_detectable(500, 3, 3)
    few, many = detectable_with_one_seed(500, 0.15, 1), detectable_with_one_seed(2000, 0.15, 1)
    assert many < few < detectable_with_one_seed(500, 0.15, 3)
    # (1.96 + .8416) √(.15 / 10⁶) + 10⁻⁶: what the textbook has for McNemar's test where items are many.
    assert detectable_with_one_seed(10**6, 0.15, 1) == pytest.approx(0.001086, rel=1e-3)


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_what_could_be_detected_is_found_in_four_of_five_comparisons(
    seeds: int, generator: np.random.Generator
) -> None:
    # one seed is tested on the two adapters that it gave, which knows no spread between seeds
    if seeds == 1:
        truth = Truth(detectable_with_one_seed(300, 0.15, 1), between_seeds=(0.0, 0.0))
    else:
        truth = Truth(expected_detectable(300, seeds, 1, between_seeds=0.01), between_seeds=(0.01, 0.01))
    pairs = simulate(truth, 400, seeds, 300, generator)
    one_by_one = [Estimate.of(one, 1).p_value for one in pairs]
    assert 0.75 < np.mean(np.array(one_by_one) < 0.05) < 0.87


def test_the_simulated_truth_is_what_it_says(generator: np.random.Generator) -> None:
    truth = Truth(difference=0.03, between_seeds=(0.02, 0.02), together=0.5)
    pairs = simulate(truth, 1000, 3, 400, generator)
    assert pairs.mean() == pytest.approx(0.03, abs=0.003)
    assert np.abs(pairs).mean() == pytest.approx(0.15, abs=0.003)
    spread = Spread.of(pairs)
    assert spread.persistent.mean() == pytest.approx(0.4 * 0.15, abs=0.006)
    # Two seeds' variances less twice their covariance.
    assert ((spread.seeds - spread.residual) / 400).mean() == pytest.approx(0.02**2, rel=0.15)


@pytest.mark.parametrize("between_seeds", [0.0, 0.02, 0.03])
def test_equal_arms_are_seldom_called_different(between_seeds: float, generator: np.random.Generator) -> None:
    pairs = simulate(Truth(between_seeds=(between_seeds, between_seeds)), 600, 3, 500, generator)
    assert (random_effects_p_value(pairs) < 0.05).mean() <= 0.08
    over_items = stats.ttest_1samp(pairs.mean(axis=1), 0, axis=1).pvalue
    if between_seeds:
        assert (over_items < 0.05).mean() > 0.15


def test_unequal_arms_are_found(generator: np.random.Generator) -> None:
    pairs = simulate(Truth(difference=0.05), 200, 3, 500, generator)
    assert (random_effects_p_value(pairs) < 0.05).mean() > 0.8
