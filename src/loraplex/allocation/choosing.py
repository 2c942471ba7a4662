"""From scores to ranks under a budget: on or off at full rank, as in the papers, or in proportion to the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from loraplex.allocation.budget import Budget, Priced

Scores = Mapping[str, float]


def on_or_off(
    candidates: Sequence[Priced], scores: Scores, budget: Budget, generator: torch.Generator
) -> tuple[dict[str, int], list[str]]:
    """Return the ranks by site, all or none of each, and the sites whose tie was broken by `generator`.

    Candidates are taken from the highest score down as long as the budget pays; one that it does not pay is passed
    over for cheaper ones below it. Where equal scores stand at the border, chance chooses among them.
    """
    shuffled = [candidates[index] for index in torch.randperm(len(candidates), generator=generator).tolist()]
    ranked = sorted(shuffled, key=lambda candidate: -scores[candidate.name])
    ranks = dict.fromkeys((candidate.name for candidate in candidates), 0)
    left = budget.amount
    refused: list[Priced] = []
    for candidate in ranked:
        price = budget.price(candidate, candidate.ranks)
        if price <= left:
            ranks[candidate.name], left = candidate.ranks, left - price
        else:
            refused.append(candidate)
    taken_scores = {scores[name] for name, rank in ranks.items() if rank}
    at_the_border = {scores[candidate.name] for candidate in refused} & taken_scores
    return ranks, [candidate.name for candidate in candidates if scores[candidate.name] in at_the_border]


def in_proportion(candidates: Sequence[Priced], scores: Scores, budget: Budget) -> dict[str, int]:
    """Return ranks in proportion to the scores, at most all of a site, as many as the budget pays.

    Ranks are ⌊λ·score⌋ with the largest λ that the budget pays; what is left goes, a rank each, to the sites that λ
    came nearest to giving one more.
    """
    highest = max(scores.values(), default=0.0)
    if highest <= 0:
        return dict.fromkeys((candidate.name for candidate in candidates), 0)

    def at(factor: float) -> dict[str, int]:
        return {c.name: int(min(c.ranks, factor * max(0.0, scores[c.name] / highest))) for c in candidates}

    low, high = 0.0, 1.0
    most = max(candidate.ranks for candidate in candidates)
    smallest = min((score for score in scores.values() if score > 0), default=highest)
    # beyond this factor every site with a score has all its ranks
    limit = min(1e300, (most + 1) * highest / smallest)
    while high < limit and budget.spent(candidates, at(high)) <= budget.amount:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if budget.spent(candidates, at(middle)) <= budget.amount else (low, middle)
    ranks = at(low)
    left = budget.amount - budget.spent(candidates, ranks)
    wanting = sorted(candidates, key=lambda c: -(low * max(0.0, scores[c.name] / highest) - ranks[c.name]))
    for candidate in wanting:
        now = ranks[candidate.name]
        if now >= candidate.ranks or scores[candidate.name] <= 0:
            continue
        price = budget.price(candidate, now + 1) - budget.price(candidate, now)
        if price <= left:
            ranks[candidate.name], left = now + 1, left - price
    return ranks
