"""Budget: how much may be open, in parameters, ranks or modules; what a choice costs, and that it never costs more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from loraplex.errors import UserError, nearest
from loraplex.option_values import is_number

UNITS = ("parameters", "ranks", "modules")


class Priced(Protocol):
    """A candidate, as far as a budget knows it."""

    @property
    def name(self) -> str:
        """Full module name."""

    @property
    def ranks(self) -> int:
        """Number of ranks that it could have."""

    def cost(self, ranks: int) -> int:
        """Return its parameters with that many open ranks."""


@dataclass(frozen=True)
class Budget:
    """An amount in one of `UNITS`."""

    amount: int
    unit: str

    def price(self, candidate: Priced, ranks: int) -> int:
        """Return what that many open ranks of a candidate cost in this budget's unit."""
        if self.unit == "parameters":
            return candidate.cost(ranks)
        return ranks if self.unit == "ranks" else min(ranks, 1)

    def spent(self, candidates: Sequence[Priced], ranks: Mapping[str, int]) -> int:
        """Return what all open ranks cost together."""
        return sum(self.price(candidate, ranks.get(candidate.name, 0)) for candidate in candidates)

    def __str__(self) -> str:
        return f"{self.amount:,} {self.unit}"


def share_of(candidates: Sequence[Priced], share: float, unit: str, *, rounded: bool = False) -> Budget:
    """Return the budget that is a share p of all candidates at full rank: ⌊p·Σ price⌋, or `rounded` to the nearest."""
    whole = Budget(0, unit)
    amount = share * sum(whole.price(candidate, candidate.ranks) for candidate in candidates)
    # 0.29 of 100 are 29, though the product of the two floats is a little less
    return Budget(round(amount) if rounded else math.floor(amount * (1 + 1e-12)), unit)


def most_parameters(candidates: Sequence[Priced], budget: Budget) -> int:
    """Return how many parameters the budget pays for at most: exact for parameters, else for the dearest choice."""
    if budget.unit == "parameters":
        return budget.amount
    left, found = budget.amount, 0
    for candidate in sorted(candidates, key=lambda c: -c.cost(c.ranks) / max(1, budget.price(c, c.ranks))):
        ranks = candidate.ranks if budget.unit == "modules" else min(left, candidate.ranks)
        if left <= 0:
            break
        found, left = found + candidate.cost(ranks), left - budget.price(candidate, ranks)
    return found


def expected_parameters(candidates: Sequence[Priced], start: Mapping[str, int], budget: Budget) -> int:
    """Return how many parameters the budget stands for: its amount, where that is in parameters.

    For ranks and modules, whose price in parameters differs from site to site, it is what the ranks open at the `start`
    cost, shrunk to the budget in proportion where they exceed it.
    """
    if budget.unit == "parameters":
        return budget.amount
    spent = budget.spent(candidates, start)
    cost = sum(candidate.cost(start.get(candidate.name, 0)) for candidate in candidates)
    return cost if spent <= budget.amount else round(cost * budget.amount / spent)


def check_unit(unit: Any) -> None:
    """Raise a UserError when `unit` is none of `UNITS`."""
    if unit not in UNITS:
        raise UserError(f"budget unit is {unit!r}: choose {', '.join(UNITS)}.{nearest(str(unit), UNITS)}")


def check_share(name: str, share: Any) -> None:
    """Raise a UserError when `share` is no number above 0 and up to 1."""
    if not is_number(share) or not 0 < share <= 1:
        raise UserError(f"{name} is {share!r}: give a number above 0 and up to 1, such as 0.25")
