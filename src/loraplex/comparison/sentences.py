"""The sentences in which the statistics of a comparison are told."""

from __future__ import annotations

from collections.abc import Collection

from loraplex.comparison.paired import LEVEL, POWER, Estimate

ONE_SEED = "one seed says nothing about others"


def size_sentence(items: int, seeds: Collection[int], contrasts: int, detectable: Collection[float]) -> str:
    """Return what a size can show, in a sentence that is good before and after the runs.

    Args:
        items: Test items.
        seeds: Seeds of every contrast; one number is enough where they are equal.
        contrasts: Arms that are compared with the reference.
        detectable: The difference that every contrast of two seeds or more can detect; likewise.
    """
    if max(seeds) == 1:
        return (
            f"With 1 seed and {items:,} {_plural(items, 'item')} nothing can be decided, however large a difference "
            f"is: {ONE_SEED}."
        )
    corrected = f", corrected for {contrasts} contrasts" if contrasts > 1 else ""
    least, most = (_points(value(detectable)) for value in (min, max))
    difference = f"a difference of about {least} points"
    if least != most:
        difference = f"a difference of about {least} to {most} points, depending on the arm,"
    undecided = f" Arms with one seed stay open: {ONE_SEED}." if min(seeds) == 1 else ""
    return (
        f"With {_span(seeds)} {_plural(max(seeds), 'seed')} and {items:,} {_plural(items, 'item')} {difference} "
        f"could be detected ({100 * POWER:.0f} % power, {100 * LEVEL:.0f} % level{corrected}).{undecided}"
    )


def verdict_sentence(
    arm: str, reference: str, estimate: Estimate, adjusted_p_value: float, contrasts: int, planned_seeds: int
) -> str:
    """Return the result of one contrast in plain words.

    Args:
        arm: Name of the arm.
        reference: Name of the reference arm.
        estimate: Of the arm against the reference.
        adjusted_p_value: Corrected for `contrasts`.
        contrasts: How many arms are compared with the reference.
        planned_seeds: The sentence says where the contrast has fewer.
    """
    corrected = f" corrected for {contrasts} arms" if contrasts > 1 else ""
    p_value = f", {_p_value(adjusted_p_value)}{corrected}"
    few = f" on {estimate.seeds} of {planned_seeds} seeds" if estimate.seeds < planned_seeds else ""
    low, high = estimate.interval
    verdict = estimate.verdict(adjusted_p_value)
    if verdict != "open":
        sign = 1 if verdict == "better" else -1
        between = " to ".join(_points(bound) for bound in sorted((sign * low, sign * high)))
        by = _points(abs(estimate.difference))
        return f"{arm} is {verdict} than {reference} by {by} points{few} (95 % interval {between}{p_value})."
    between = f"{_points(low)} to {_points(high)}"
    difference = f"difference {_points(estimate.difference, signed=True)} points, 95 % interval {between}"
    if estimate.seeds == 1:
        few = few or " on one seed"
        return f"{arm} against {reference} is open{few} ({difference} over the items alone); {_outlook(estimate)}."
    # Without p a reader would wonder at an interval that leaves out zero.
    p_value = p_value if low > 0 or high < 0 else ""
    return (
        f"{arm} cannot be told apart from {reference} at this size{few} ({difference}{p_value}); {_outlook(estimate)}."
    )


def left_out_sentences(
    without_runs: Collection[str], without_shared_seeds: Collection[str], reference: str
) -> list[str]:
    """Return who takes no part and why, a sentence each."""
    return [
        *(f"{arm} is left out: none of its runs has finished." for arm in without_runs),
        *(f"{arm} is left out: it shares no finished seed with {reference}." for arm in without_shared_seeds),
    ]


def _outlook(estimate: Estimate) -> str:
    """Return what it would take to see one point."""
    if estimate.items == 1:
        return "one item cannot show a difference"
    if estimate.seeds == 1:
        return ONE_SEED
    if estimate.seeds_needed is None:
        assert estimate.items_needed is not None
        return f"seeds alone cannot show 1 point, it takes at least {_rounded(estimate.items_needed)} items"
    more = estimate.seeds_needed - estimate.seeds
    if more <= 0:
        return "a difference of 1 point would probably have been seen"
    return f"about {_rounded(more)} more {_plural(more, 'seed')} would be needed to see 1 point"


def _points(share: float, signed: bool = False) -> str:
    text = f"{100 * share:+.1f}" if signed else f"{100 * share:.1f}"
    return text.replace("-0.0", "0.0").replace("+0.0", "0.0").replace("-", "−")


def _p_value(value: float) -> str:
    if value < 0.001:
        return "p < .001"
    text = f"{value:.2g}"
    if float(text) == LEVEL:
        # Rounding must not hide on which side of the level it is.
        return "p < .05" if value < LEVEL else "p ≥ .05"
    return f"p = {text.removeprefix('0')}"


def _rounded(number: int) -> str:
    """Return a number with two significant digits, rounded up: an estimate from few seeds has no more."""
    unit = 10 ** max(len(str(number)) - 2, 0)
    return f"{-(-number // unit) * unit:,}"


def _span(numbers: Collection[int]) -> str:
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def _plural(number: int, noun: str) -> str:
    return noun if number == 1 else f"{noun}s"
