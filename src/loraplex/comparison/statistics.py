"""The statistics of a comparison: is an arm better than the reference arm, and what could this size have shown?

Training seeds and test items are both samples of what one wants to know about, so both are random here, and every item
is compared with itself under the other arm. docs/statistics.md says in plain words what is done, with measured rates of
false positives and power.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from loraplex.comparison.paired import LEVEL, Array, Estimate, Spread, detectable
from loraplex.comparison.results import Comparison
from loraplex.comparison.sentences import left_out_sentences, size_sentence, verdict_sentence
from loraplex.comparison.summary import ArmStatistics, Contrast, Summary
from loraplex.errors import UserError

_PERSISTENT = 0.4
"""Share of the variance of a pair's difference that belongs to the item and not to the seed: .36 where it was measured,
LoRA on SST-2 with 60 against 37 steps. Only plans assume it; results are tested with their own."""


def expected_detectable(
    items: int, seeds: int, contrasts: int, discordant: float = 0.15, between_seeds: float = 0.02
) -> float:
    """Return the true difference that a planned size would find with 80 % power at the 5 % level.

    Seeds are taken as independent between arms; where equal seeds go together, more can be detected than this says.

    Args:
        items: Test items.
        seeds: Training seeds of every arm, two or more; with one nothing is decided.
        contrasts: Arms that are compared with the reference; the level is divided by them.
        discordant: Share of pairs in which one of the two arms is right.
        between_seeds: Standard deviation of the accuracy between the seeds of one arm, on endlessly many items. LoRA
            had .027 and .014 on SST-2 with 60 and 37 steps and .006 on ARC-Easy.
    """
    if items == 1:
        return 1.0
    persistent, residual = discordant * _PERSISTENT, discordant * (1 - _PERSISTENT)
    of_seeds = residual + items * 2 * between_seeds**2
    spread = Spread(np.asarray(of_seeds), np.asarray(residual), np.asarray(persistent), items)
    return detectable(spread, seeds, contrasts)


def summarize(comparison: Comparison) -> Summary:
    """Return the statistics of all arms with finished runs and their contrasts with the reference arm.

    p-values are corrected by Holm's method (Scandinavian Journal of Statistics 6, 1979, 65-70); intervals are not.

    Raises:
        UserError: two runs were tested on different items.
    """
    answers = _answers(comparison)
    reference = answers.get(comparison.reference, {})
    shared = {arm: [seed for seed in runs if seed in reference] for arm, runs in answers.items()}
    compared = [arm for arm, seeds in shared.items() if seeds and arm != comparison.reference]
    estimates = [
        Estimate.of(_stacked(answers[arm], shared[arm]) - _stacked(reference, shared[arm]), len(compared))
        for arm in compared
    ]
    contrasts = _contrasts(comparison, compared, estimates)
    without_runs = [arm.name for arm in comparison.arms if arm.name not in answers]
    without_shared_seeds = [arm for arm, seeds in shared.items() if not seeds]
    sentences = [
        _beforehand(contrasts, len(comparison.arms)),
        *left_out_sentences(without_runs, without_shared_seeds if reference else [], comparison.reference),
    ]
    arms = [_arm_statistics(arm, _stacked(runs, list(runs))) for arm, runs in answers.items()]
    return Summary(arms, contrasts, " ".join(sentences))


def _answers(comparison: Comparison) -> dict[str, dict[int, Array]]:
    """Return 1 for right and 0 for wrong by arm and seed, (items,) each; only of what has finished."""
    answers: dict[str, dict[int, Array]] = {}
    first: tuple[str, int, list[str]] | None = None
    for arm in comparison.arms:
        for run in arm.runs:
            if run.state != "finished" or not run.items:
                continue
            ids = [item.id for item in run.items]
            first = first or (arm.name, run.seed, ids)
            if ids != first[2]:
                raise UserError(
                    f"'{arm.name}' with seed {run.seed} was tested on other items than '{first[0]}' with seed "
                    f"{first[1]}: test all runs on the same rows"
                )
            answers.setdefault(arm.name, {})[run.seed] = np.array([item.correct for item in run.items], dtype=float)
    return answers


def _stacked(runs: dict[int, Array], seeds: list[int]) -> Array:
    """Return the answers of these seeds as one array, (seeds, items)."""
    return np.stack([runs[seed] for seed in seeds])


def _arm_statistics(arm: str, correct: Array) -> ArmStatistics:
    """Return the statistics of one arm, correct: (seeds, items), with Student's t over the seeds for the interval."""
    seeds, items = correct.shape
    mean = float(correct.mean())
    # With one seed this is the sqrt(p (1 − p) / items) of a single evaluation.
    standard_error = math.sqrt(float(correct.mean(axis=0).var()) / items)
    if seeds == 1:
        return ArmStatistics(arm, seeds, mean, None, None, standard_error)
    between_seeds = float(correct.mean(axis=1).std(ddof=1))
    half = float(stats.t.ppf(1 - LEVEL / 2, seeds - 1)) * between_seeds / math.sqrt(seeds)
    interval = max(mean - half, 0.0), min(mean + half, 1.0)
    return ArmStatistics(arm, seeds, mean, interval, between_seeds, standard_error)


def _contrasts(comparison: Comparison, arms: list[str], estimates: list[Estimate]) -> list[Contrast]:
    from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]

    if not estimates:
        return []
    adjusted = multipletests([estimate.p_value for estimate in estimates], method="holm")[1]
    return [
        _contrast(comparison, arm, estimate, float(p_value), len(arms))
        for arm, estimate, p_value in zip(arms, estimates, adjusted, strict=True)
    ]


def _contrast(comparison: Comparison, arm: str, estimate: Estimate, adjusted: float, contrasts: int) -> Contrast:
    reference, planned = comparison.reference, len(comparison.seeds)
    return Contrast(
        arm=arm,
        reference=reference,
        seeds=estimate.seeds,
        items=estimate.items,
        difference=estimate.difference,
        interval=estimate.interval,
        p_value=estimate.p_value,
        adjusted_p_value=adjusted,
        detectable=estimate.detectable,
        seeds_needed=estimate.seeds_needed,
        verdict=estimate.verdict(adjusted),
        sentence=verdict_sentence(arm, reference, estimate, adjusted, contrasts, planned),
    )


def _beforehand(contrasts: list[Contrast], arms: int) -> str:
    if not contrasts:
        reason = "there is only one arm" if arms == 1 else "no two arms have finished the same seed"
        return f"Nothing can be compared: {reason}."
    seeds = [contrast.seeds for contrast in contrasts]
    differences = [contrast.detectable for contrast in contrasts if contrast.seeds > 1]
    return size_sentence(contrasts[0].items, seeds, len(contrasts), differences)
