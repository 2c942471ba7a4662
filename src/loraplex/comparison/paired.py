"""One arm against another on the same items: the paired tests, what they could find, and what they would need.

Pairs are arrays (..., seeds, items) of differences: 1 where only the arm is right, -1 where only the reference arm is,
0 where they agree. docs/statistics.md describes the tests in plain words and has their measured rates of false
positives and power.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats  # type: ignore[import-untyped]

LEVEL = 0.05
POWER = 0.8
POINT = 0.01
_CREDIT = 4
"""Degrees of freedom that a seed beyond the first can give, by simulation of 2 seeds and 500 items: 6 has 9 % false
positives at a spread of .03 between seeds, 4 has 8 %; 3 has 5 %, but 50 instead of 62 % power for 5 points at none."""
_MOST_SEEDS = 1_000_000
_DRAWS = 201

Array = npt.NDArray[np.float64]
Verdict = Literal["better", "worse", "open"]


@dataclass(frozen=True)
class MeanSquares:
    """Mean squares of values y: (..., seeds, items) with one value for every seed and item, both of them random.

    MS(seed) = items · Σ_s (ȳ_s − ȳ)² / (seeds − 1),  MS(item) = seeds · Σ_i (ȳ_i − ȳ)² / (items − 1),
    MS(seed × item) = Σ_si (y_si − ȳ_s − ȳ_i + ȳ)² / ((seeds − 1)(items − 1)).
    """

    seeds: Array
    items: Array
    residual: Array

    @classmethod
    def of(cls, y: Array) -> MeanSquares:
        """Return the mean squares of at least two seeds and two items; leading axes are kept."""
        seeds, items = y.shape[-2:]
        mean = y.mean(axis=(-2, -1), keepdims=True)
        by_seed = y.mean(axis=-1, keepdims=True) - mean  # (..., seeds, 1)
        by_item = y.mean(axis=-2, keepdims=True) - mean  # (..., 1, items)
        rest = y - mean - by_seed - by_item  # (..., seeds, items)
        return cls(
            seeds=items * (by_seed**2).sum(axis=(-2, -1)) / (seeds - 1),
            items=seeds * (by_item**2).sum(axis=(-2, -1)) / (items - 1),
            residual=(rest**2).sum(axis=(-2, -1)) / ((seeds - 1) * (items - 1)),
        )


@dataclass(frozen=True)
class Spread:
    """Where the variance of a mean paired difference D comes from, D being -1, 0 or 1 for every seed and item.

    Var(D̄) = [max(S, E) + seeds · σ²] / (seeds · items) with S = MS(seed), E = MS(seed × item) and the variance between
    items σ² = max(MS(item) − E, 0) / seeds. Its degrees of freedom, by Satterthwaite (Biometrics Bulletin 2, 1946,
    110-114), are [max(S, E) + seeds · σ²]² / [S² / (seeds − 1) + (E + seeds · σ²)² / (items − 1)], at most
    4 (seeds − 1).

    It is the analysis of Dorfman, Berbaum and Metz, and of Obuchowski and Rockette, of readers and cases, here seeds
    and items, with Hillis' degrees of freedom (Statistics in Medicine 26, 2007, 596-619): Var(D̄) =
    [S + max(MS(item) − E, 0)] / (seeds · items), df = [S + max(MS(item) − E, 0)]² / [S² / (seeds − 1)]. By simulation
    (`python -m benchmarks power`; 500 items, a spread of .03 between seeds) that calls equal arms different in 13 % of
    comparisons with 2 seeds and in 8 % with 3, because S, from so few, is now and then far too small; this one in 8 %
    and in 7 %. The three differences:

    * S counts for no less than E, which it exceeds on average: the variance is never below that of the items alone.
    * The degrees of freedom are at most 4 (seeds − 1): a small S does not make many seeds of few.
    * The items have degrees of freedom too, which matters where there are few of them.
    """

    seeds: Array
    residual: Array
    persistent: Array
    """σ², what belongs to the item whatever the seed."""
    items: int

    @classmethod
    def of(cls, pairs: Array) -> Spread:
        """Estimate it from D, (..., seeds, items)."""
        squares = MeanSquares.of(pairs)
        persistent = np.maximum(squares.items - squares.residual, 0) / pairs.shape[-2]
        return cls(squares.seeds, squares.residual, persistent, pairs.shape[-1])

    def variance(self, seeds: int) -> Array:
        """Return the variance of the mean difference with so many seeds."""
        return self._total(seeds) / (seeds * self.items)

    def degrees_of_freedom(self, seeds: int) -> Array:
        """Return those of the variance with so many seeds; not a number where nothing varies."""
        of_items = self.residual + seeds * self.persistent
        uncertainty = self.seeds**2 / (seeds - 1) + of_items**2 / (self.items - 1)
        with np.errstate(invalid="ignore"):
            return np.minimum(self._total(seeds) ** 2 / uncertainty, _CREDIT * (seeds - 1))

    def _total(self, seeds: int) -> Array:
        return np.asarray(np.maximum(self.seeds, self.residual) + seeds * self.persistent)


def random_effects_p_value(pairs: Array) -> Array:
    """Return the two-sided p-value of no difference, pairs: (..., seeds, items); 1 where nothing varies at all."""
    seeds, spread = pairs.shape[-2], Spread.of(pairs)
    variance = spread.variance(seeds)
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = np.abs(pairs.mean(axis=(-2, -1))) / np.sqrt(variance)
        return np.where(variance > 0, 2 * stats.t.sf(distance, spread.degrees_of_freedom(seeds)), 1.0)


@dataclass(frozen=True)
class Estimate:
    """What the items say about two arms, before the correction for several arms."""

    seeds: int
    items: int
    difference: float
    interval: tuple[float, float]
    """95 % interval of the difference; with one seed it allows for the items alone."""
    p_value: float
    """Of no difference; with one seed that of two adapters, which says nothing about other seeds."""
    detectable: float
    seeds_needed: int | None
    items_needed: int | None
    """Items that one point takes at least, where no number of seeds can show it with these."""

    @classmethod
    def of(cls, pairs: Array, contrasts: int) -> Estimate:
        """Compare two arms, pairs: (seeds, items); `contrasts` divides the level of what could be detected."""
        if pairs.shape[1] == 1:
            # One item is no sample of items, however many seeds have answered it.
            return cls(len(pairs), 1, float(pairs.mean()), (-1.0, 1.0), 1.0, 1.0, None, None)
        if (pairs == pairs[0]).all():
            # One seed, or several that say the same of every item and so no more than one would.
            return _exact(pairs, contrasts)
        return _random_effects(pairs, contrasts)

    def verdict(self, adjusted_p_value: float) -> Verdict:
        """Return what is decided, by the p-value corrected for the number of arms; one seed decides nothing."""
        if self.seeds == 1 or adjusted_p_value >= LEVEL:
            return "open"
        return "better" if self.difference > 0 else "worse"


def _random_effects(pairs: Array, contrasts: int) -> Estimate:
    seeds, items = pairs.shape
    spread, difference = Spread.of(pairs), float(pairs.mean())
    half = stats.t.ppf(1 - LEVEL / 2, spread.degrees_of_freedom(seeds)) * np.sqrt(spread.variance(seeds))
    # With endless seeds only σ² is left.
    items_needed = math.ceil(sum(_quantiles(contrasts)) ** 2 * float(spread.persistent) / POINT**2)
    needed = _seeds_needed(spread, contrasts) if items_needed < items else None
    return Estimate(
        seeds=seeds,
        items=items,
        difference=difference,
        interval=_bounded(difference - float(half), difference + float(half)),
        p_value=float(random_effects_p_value(pairs)),
        detectable=detectable(spread, seeds, contrasts),
        seeds_needed=needed,
        items_needed=max(items_needed, items + 1) if needed is None else None,
    )


def _exact(pairs: Array, contrasts: int) -> Estimate:
    """Compare by one seed's pairs, with McNemar's exact test; pairs: (seeds, items), all rows equal.

    The interval is the wider, on either side, of two: that of Clopper and Pearson for the share of discordant pairs
    that the arm wins, which leaves out 0 exactly where p < .05; and that of Agresti and Min (Statistics in
    Medicine 24, 2005, 729-740), which adds half a pair to every cell and allows for the number of discordant pairs
    being random too.
    """
    from statsmodels.stats.proportion import proportion_confint  # type: ignore[import-untyped]

    seeds, items = pairs.shape
    won, lost = int((pairs[0] > 0).sum()), int((pairs[0] < 0).sum())
    discordant = (won + lost) / items
    center = (won - lost) / (items + 2)
    half = stats.norm.ppf(1 - LEVEL / 2) * math.sqrt(won + lost + 1 - center**2 * (items + 2)) / (items + 2)
    low, high = center - half, center + half
    if won + lost:
        shares = proportion_confint(won, won + lost, alpha=LEVEL, method="beta")
        low, high = min(low, (2 * shares[0] - 1) * discordant), max(high, (2 * shares[1] - 1) * discordant)
    found = detectable_with_one_seed(items, discordant, contrasts)
    # More seeds would repeat these answers; of a single one it is not known what more of them would say.
    needed = seeds if seeds > 1 and found <= POINT else None
    return Estimate(
        seeds=seeds,
        items=items,
        difference=(won - lost) / items,
        interval=_bounded(float(low), float(high)),
        p_value=exact_p_value(won, lost),
        detectable=found,
        seeds_needed=needed,
        items_needed=_items_with_one_seed(discordant, contrasts) if seeds > 1 and needed is None else None,
    )


def exact_p_value(won: int, lost: int) -> float:
    """Return the two-sided p-value of McNemar's exact test, from the pairs that each side wins alone."""
    from statsmodels.stats.contingency_tables import mcnemar  # type: ignore[import-untyped]

    return float(mcnemar([[0, won], [lost, 0]], exact=True).pvalue)


def _bounded(low: float, high: float) -> tuple[float, float]:
    return max(low, -1.0), min(high, 1.0)


def detectable(spread: Spread, seeds: int, contrasts: int) -> float:
    """Return the true difference that so many seeds find with 80 % power at the 5 % level divided by `contrasts`.

    Solves the mean over S of P(|D̄| > t √V(S)) = .8, D̄ normal around the difference with the variance of `spread`; V(S)
    is the estimate that the test makes from S, which varies as (its mean) · χ² / (seeds − 1), and t has the degrees of
    freedom that go with it. The items are taken to be many.
    """
    drawn = stats.chi2.ppf((np.arange(_DRAWS) + 0.5) / _DRAWS, seeds - 1) / (seeds - 1)
    estimated = replace(spread, seeds=np.maximum(spread.seeds, spread.residual) * drawn)
    critical = stats.t.ppf(1 - LEVEL / (2 * contrasts), estimated.degrees_of_freedom(seeds))
    bounds = critical * np.sqrt(estimated.variance(seeds))
    deviation = math.sqrt(float(spread.variance(seeds)))

    def missing(difference: float) -> float:
        found = special.ndtr((difference - bounds) / deviation) + special.ndtr((-difference - bounds) / deviation)
        return POWER - float(np.mean(found))

    return 1.0 if missing(1.0) >= 0 else float(optimize.brentq(missing, 0, 1))


def detectable_with_one_seed(items: int, discordant: float, contrasts: int) -> float:
    """Return the true difference that McNemar's test finds with 80 % power, `discordant` the share of unequal pairs.

    δ = [z₁ √q + z₂ √(q − δ²)] / √items + 1 / items with z₁ and z₂ the normal quantiles of level and power (Miettinen,
    Biometrics 24, 1968, 339-352); the last term makes up for the test's being exact. q is at least δ.
    """
    level, power = _quantiles(contrasts)

    def excess(difference: float) -> float:
        share = max(discordant, difference)
        spread = level * math.sqrt(share) + power * math.sqrt(share - difference**2)
        return difference - spread / math.sqrt(items) - 1 / items

    return 1.0 if excess(1.0) <= 0 else float(optimize.brentq(excess, 0, 1))


def _quantiles(contrasts: int) -> tuple[float, float]:
    """Return the normal quantiles that belong to the level and to the power."""
    return float(stats.norm.ppf(1 - LEVEL / (2 * contrasts))), float(stats.norm.ppf(POWER))


def _items_with_one_seed(discordant: float, contrasts: int) -> int:
    """Return the items with which McNemar's test finds one point."""
    few, many = 1, 2
    while detectable_with_one_seed(many, discordant, contrasts) > POINT:
        few, many = many, 2 * many
    return _smallest(few, many, lambda items: detectable_with_one_seed(items, discordant, contrasts) <= POINT)


def _seeds_needed(spread: Spread, contrasts: int) -> int | None:
    """Return the seeds with which one point can be detected, None where the items forbid it."""
    few, many = 1, 2
    while detectable(spread, many, contrasts) > POINT:
        few, many = many, 2 * many
        if many > _MOST_SEEDS:
            return None
    return _smallest(few, many, lambda seeds: detectable(spread, seeds, contrasts) <= POINT)


def _smallest(few: int, many: int, enough: Callable[[int], bool]) -> int:
    """Return the smallest number that is enough, knowing that `few` is not and `many` is."""
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many
