"""What the statistics of `loraplex compare` find, by simulation of arms whose true accuracies are known.

Fills the tables of docs/statistics.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.progress import track
from scipy import optimize, special, stats

from benchmarks import results
from benchmarks.environment import environment
from benchmarks.results import Plan
from benchmarks.rounds import ROOT
from benchmarks.terminal import errors, output
from loraplex.comparison.paired import LEVEL, Array, MeanSquares, exact_p_value, random_effects_p_value
from loraplex.files import write_atomically

PAGE = ROOT / "docs" / "statistics.md"
TESTS = ("loraplex", "Hillis", "items only")
DIFFERENCES = (0.0, 0.01, 0.03, 0.05)
ITEMS = (100, 500)
SEEDS = (1, 2, 3, 5, 10)
# So many items are simulated for false positives with few seeds only, where they make a difference.
MANY_ITEMS, FEW_SEEDS = 2000, (2, 3)
_CASE = ("between_seeds", "items", "seeds", "difference")
_BLOCK = 2_000_000
"""Answers of one arm that are drawn at once."""


@dataclass(frozen=True)
class Truth:
    """Two arms that differ in accuracy, or in the spread of their seeds, and in nothing else."""

    difference: float = 0.0
    accuracy: float = 0.8
    """Mean of the two arms."""
    discordant: float = 0.15
    """Share of pairs in which one arm is right, where the arms are equal."""
    persistent: float = 0.4
    """Share of the pairs' variance that belongs to the item and comes back with every seed."""
    between_seeds: tuple[float, float] = (0.0, 0.0)
    """Standard deviation of either arm's accuracy between seeds, on endlessly many items."""
    together: float = 0.0
    """Correlation of what a seed does to one arm with what it does to the other."""


TRUTHS = {
    "0": Truth(),
    ".01": Truth(between_seeds=(0.01, 0.01)),
    ".02": Truth(between_seeds=(0.02, 0.02)),
    ".03": Truth(between_seeds=(0.03, 0.03)),
    ".02, same seeds correlated .8": Truth(between_seeds=(0.02, 0.02), together=0.8),
    ".005 and .04": Truth(between_seeds=(0.005, 0.04)),
    ".005 and .04, accuracy .9": Truth(accuracy=0.9, discordant=0.1, between_seeds=(0.005, 0.04)),
}


def simulate(truth: Truth, repetitions: int, seeds: int, items: int, generator: np.random.Generator) -> Array:
    """Return pairs, (repetitions, seeds, items): 1 where only the second arm is right, -1 where only the first is.

    An answer is right where a normal variable of variance 1 is below a threshold: the sum of what the item, the item
    under this arm, the seed of this arm and this answer alone contribute. Their variances are those with which the
    accuracy, the discordant pairs, what of them persists, and the spread between seeds come out as wanted.
    """
    threshold = special.ndtri(truth.accuracy)
    # Two answers to one item by different arms, and by one arm under two seeds.
    by_item = _correlation(threshold, truth.accuracy - truth.discordant / 2)
    by_arm = _correlation(threshold, truth.accuracy - truth.discordant * (1 - truth.persistent) / 2) - by_item
    item = generator.standard_normal((repetitions, 1, items), np.float32) * np.float32(by_item**0.5)
    first_seed, other = generator.standard_normal((2, repetitions, seeds, 1), np.float32)
    second_seed = truth.together * first_seed + (1 - truth.together**2) ** 0.5 * other
    right = []
    for arm, effect in enumerate((first_seed, second_seed)):
        # Two answers by one arm under one seed to different items.
        by_seed = _correlation(threshold, truth.accuracy**2 + truth.between_seeds[arm] ** 2)
        latent = item + generator.standard_normal(item.shape, np.float32) * np.float32(by_arm**0.5)
        noise = generator.standard_normal((repetitions, seeds, items), np.float32)
        latent = latent + noise * np.float32((1 - by_item - by_arm - by_seed) ** 0.5)
        bound = special.ndtri(truth.accuracy + (arm - 0.5) * truth.difference)
        right.append(latent + effect * np.float32(by_seed**0.5) < bound)
    return np.asarray(right[1].astype(np.float64) - right[0])


def _correlation(threshold: float, both: float) -> float:
    """Return the correlation with which two standard normal variables are both below the threshold so often.

    P(X < h, Y < h) = Φ(h) − 2 T(h, √((1 − ρ) / (1 + ρ))), T being Owen's function.
    """

    def excess(correlation: float) -> float:
        slope = ((1 - correlation) / (1 + correlation)) ** 0.5
        return float(special.ndtr(threshold) - 2 * special.owens_t(threshold, slope) - both)

    return float(optimize.brentq(excess, -1e-9, 1 - 1e-9))


def p_values(pairs: Array) -> dict[str, Array]:
    """Return the p-values of the product's test, and with several seeds those of the tests that it was chosen over."""
    if pairs.shape[1] == 1:
        won, lost = ((sign * pairs[:, 0] > 0).sum(axis=-1) for sign in (1, -1))
        return {"loraplex": np.array([exact_p_value(int(w), int(n)) for w, n in zip(won, lost, strict=True)])}
    return {"loraplex": random_effects_p_value(pairs), "Hillis": _hillis(pairs), "items only": _items_only(pairs)}


def _hillis(pairs: Array) -> Array:
    """Return the p-values of the original analysis (Statistics in Medicine 26, 2007, 596-619)."""
    squares, seeds = MeanSquares.of(pairs), pairs.shape[1]
    total = squares.seeds + np.maximum(squares.items - squares.residual, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = np.abs(pairs.mean(axis=(1, 2))) / np.sqrt(total / pairs[0].size)
        return np.where(total > 0, 2 * stats.t.sf(distance, total**2 / (squares.seeds**2 / (seeds - 1))), 1.0)


def _items_only(pairs: Array) -> Array:
    """Return the p-values of a paired t-test over items, each with its mean over the seeds."""
    means = pairs.mean(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = np.abs(means.mean(axis=1)) / (means.std(axis=1, ddof=1) / means.shape[1] ** 0.5)
        return np.where(means.any(axis=1), 2 * stats.t.sf(distance, means.shape[1] - 1), 1.0)


def found(truth: Truth, repetitions: int, seeds: int, items: int, generator: np.random.Generator) -> dict[str, float]:
    """Return the share of repetitions in which each test calls the arms different."""
    block = max(_BLOCK // (seeds * items), 1)
    parts = [
        p_values(simulate(truth, min(block, repetitions - start), seeds, items, generator))
        for start in range(0, repetitions, block)
    ]
    return {test: float((np.concatenate([part[test] for part in parts]) < LEVEL).mean()) for test in parts[0]}


def run(plan: Plan) -> None:
    """Simulate all cases, write `power.json` and fill the page's tables."""
    cases = [
        *itertools.product(TRUTHS, ITEMS, SEEDS, DIFFERENCES),
        *itertools.product(TRUTHS, (MANY_ITEMS,), FEW_SEEDS, (0.0,)),
    ]
    result: dict[str, Any] = {
        "benchmark": "power",
        "repetitions": plan.rounds,
        "environment": environment(),
        "truths": {name: asdict(truth) for name, truth in TRUTHS.items()},
        "cases": [],
    }
    for index, case in enumerate(track(cases, "power", console=errors, transient=True)):
        name, items, seeds, difference = case
        truth = replace(TRUTHS[name], difference=difference)
        share = found(truth, plan.rounds, seeds, items, np.random.default_rng(index))
        result["cases"].append(dict(zip(_CASE, case, strict=True)) | {"found": share})
    results.write(result, plan)
    if not plan.quick:
        fill(result)


def fill(result: Mapping[str, Any]) -> None:
    """Write the tables between the markers of the page."""
    tables = {
        "false positives": by_seeds(result, differences=(0.0,)),
        "tests": by_test(result),
        "power": by_seeds(result, differences=DIFFERENCES[1:]),
        "run": [_ran_on(result)],
    }
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in tables.items():
        head, begin, rest = text.partition(f"<!-- begin {name} -->\n")
        _, end, tail = rest.partition(f"<!-- end {name} -->")
        assert end, f"{PAGE.name} has no markers for {name}"
        text = head + begin + "\n".join(lines) + "\n" + end + tail
    write_atomically(PAGE, text)
    output.print(f"written to {PAGE.relative_to(ROOT)}")


def by_seeds(result: Mapping[str, Any], differences: Sequence[float]) -> Iterator[str]:
    """Yield the lines of a table: in how many of 100 comparisons loraplex calls the arms different."""
    yield f"| spread between seeds | items | true difference | {' | '.join(_seeds(count) for count in SEEDS)} |"
    yield "|---|---:|---:|" + "---:|" * len(SEEDS)
    for name in TRUTHS:
        for items in ITEMS:
            for difference in differences:
                cells = (_percent(result, "loraplex", name, items, seeds, difference) for seeds in SEEDS)
                yield f"| {name} | {items} | {100 * difference:.0f} | {' | '.join(cells)} |"


def by_test(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table: false positives of loraplex's test and of others, with few seeds."""
    heads = (f"{test}, {_seeds(count)}" for test in TESTS for count in FEW_SEEDS)
    yield f"| spread between seeds | items | {' | '.join(heads)} |"
    yield "|---|---:|" + "---:|" * len(TESTS) * len(FEW_SEEDS)
    for name in TRUTHS:
        for items in (ITEMS[-1], MANY_ITEMS):
            cells = (_percent(result, test, name, items, seeds, 0.0) for test in TESTS for seeds in FEW_SEEDS)
            yield f"| {name} | {items} | {' | '.join(cells)} |"


def _percent(result: Mapping[str, Any], test: str, name: str, items: int, seeds: int, difference: float) -> str:
    wanted = dict(zip(_CASE, (name, items, seeds, difference), strict=True))
    share = next(case["found"][test] for case in result["cases"] if wanted.items() <= case.items())
    return f"{100 * share:.1f}" if difference == 0 else f"{100 * share:.0f}"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _ran_on(result: Mapping[str, Any]) -> str:
    ran = result["environment"]
    error = 100 * (0.05 * 0.95 / result["repetitions"]) ** 0.5
    return (
        f"{result['repetitions']} repetitions of every case, so that 5.0 has a standard error of {error:.1f}; "
        f"{ran['date']}, commit {ran['commit']}."
    )
