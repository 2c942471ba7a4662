"""HeteroLoRA: a zero-cost proxy ranks all sites, and the budget goes to the best of them.

Paper: Zhang et al., Unlocking the Global Synergies in Low-Rank Adapters, arXiv 2406.14956, section 3; rules of the
allocation as in the official code (ZixiBenZhang/lora_global_synergies): with N candidates of equal rank, ⌊p·N⌋ are on.
Static: scored once, before training. Dynamic: scored again every so often, on the same batches, with all candidates on;
a site that loses is bypassed, keeps its values, and may come back. Ranks in proportion to the score are our extension.
With M shortcuts as further candidates (see `allocation.shortcuts`) the budget is ⌊p·N⌋ + round(p·M), in one ranking
over both, or in one for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.adapters.registry import REGISTRY, Axis, Capability, Method
from loraplex.allocation.budget import UNITS, Budget, check_share, check_unit, share_of
from loraplex.allocation.choosing import in_proportion, on_or_off
from loraplex.allocation.contracts import Candidate, Gates, Revision, ScoringContext
from loraplex.allocation.proxies import PROXIES, Scoring, score
from loraplex.allocation.shortcuts import ShortcutOptions
from loraplex.errors import UserError, nearest
from loraplex.option_values import is_number, is_whole

_BLIND = ("snip", "synflow")
"""Proxies that see nothing where B = 0."""
_OF_WEIGHTS = ("fisher",)
"""Proxies of what a frozen weight puts out, which a residual edge has not."""


@dataclass(frozen=True)
class HeteroLoRA(ShortcutOptions):
    """Options of HeteroLoRA; those of the paper are the defaults."""

    delay = "warm_up"
    proxy: str = "grad_norm"
    """What a site is worth: grad_norm, snip, synflow, fisher, grasp, alpha_test, or constant (chance)."""
    share: float = 0.25
    """p: which part of all candidates at full rank is paid for."""
    unit: str = "modules"
    """What the share is a share of: modules, as in the paper, ranks or parameters."""
    ranks: str = "on_or_off"
    """"on_or_off": all ranks of a site or none; "proportional": as many as its score asks for."""
    batches: int = 32
    """K: batches that the score is taken over, the first of the training set in its order."""
    interval: float | None = None
    """Score again: after so many steps, or below 1 after this part of an epoch. Absent: once."""
    warm_up: int = 0
    """Steps with all candidates on before they are scored for the first time."""
    score_target: str = "adapter"
    """Score the "adapter"'s factors, or the "frozen" weight under them."""
    gradient: str = "summed"
    """For grad_norm: the norm of the "summed" gradient, or the "mean_of_norms" of the batches."""
    normalize: str = "none"
    """Divide scores by the number of parameters ("numel"), its root ("sqrt_numel"), or not ("none")."""
    scoring_init: str = "own"
    """"random" scores with B drawn like A and puts it back; "own" scores B as it is."""
    tolerance: float = 0.01
    """For alpha_test: by which share the loss may rise."""
    synflow: str = "logits"
    """For synflow: the sum of the "logits", or the "loss"."""
    separate_rankings: bool = False
    """With shortcuts: rank them and the linear sites apart, each with its own share, instead of in one ranking."""

    def __post_init__(self) -> None:
        """Refuse what is not among the choices."""
        super().__post_init__()
        choices: dict[str, Sequence[str]] = {
            "proxy": list(PROXIES),
            "ranks": ("on_or_off", "proportional"),
            "score_target": ("adapter", "frozen"),
            "gradient": ("summed", "mean_of_norms"),
            "normalize": ("none", "numel", "sqrt_numel"),
            "scoring_init": ("own", "random"),
            "synflow": ("logits", "loss"),
            "unit": UNITS,
        }
        for name, known in choices.items():
            _check_choice(name, getattr(self, name), known)
        if not isinstance(self.separate_rankings, bool):
            raise UserError(f"separate_rankings is {self.separate_rankings!r}: give true or false")
        check_unit(self.unit)
        check_share("share", self.share)
        if self.ranks == "proportional" and self.unit == "modules":
            raise UserError("ranks: proportional needs a budget of ranks or parameters: set unit to one of them")
        for name, least in (("batches", 1), ("warm_up", 0)):
            value = getattr(self, name)
            if not is_whole(value) or value < least:
                raise UserError(f"{name} is {value!r}: give a whole number of at least {least}")
        if not is_number(self.tolerance) or not self.tolerance >= 0:
            raise UserError(f"tolerance is {self.tolerance!r}: give a share of at least 0, such as 0.01")
        if self.interval is not None and (not is_number(self.interval) or not self.interval > 0):
            raise UserError(f"interval is {self.interval!r}: give steps, or a part of an epoch below 1")
        if self.shortcuts and (self.proxy in _OF_WEIGHTS or self.score_target == "frozen"):
            what = f"proxy {self.proxy}" if self.score_target == "adapter" else "score_target: frozen"
            raise UserError(f"{what} looks at the frozen weight of a site, and shortcuts have none: take grad_norm")

    def due(self, total_steps: int, steps_per_epoch: int) -> Sequence[int]:
        """Return the first revision and, for the dynamic method, those after it."""
        if self.interval is None:
            return [self.warm_up]
        period = int(self.interval) if self.interval >= 1 else max(1, round(self.interval * steps_per_epoch))
        return list(range(self.warm_up, total_steps, period))

    def start(self, candidates: Sequence[Candidate], rank: Callable[[str], int]) -> tuple[Gates, Budget]:
        """Return all gates open, which lasts until the first revision, and the budget."""
        amount = sum(budget.amount for _, budget in self._rankings(candidates))
        return {candidate.name: torch.ones(candidate.ranks) for candidate in candidates}, Budget(amount, self.unit)

    def revise(self, context: ScoringContext) -> Revision:
        """Score all candidates and give the budget to the best.

        Raises:
            UserError: when no candidate has a score above another's because there is nothing to see yet.
        """
        scores = score(self.proxy, context, self._scoring)
        if self.proxy != "constant" and not any(scores.values()):
            raise UserError(self._blind(context))
        tied: list[str] = []
        ranks: dict[str, int] = {}
        generator = context.generator()
        for candidates, budget in self._rankings(context.candidates):
            if self.ranks == "proportional":
                ranks |= in_proportion(candidates, {c.name: scores[c.name] for c in candidates}, budget)
            else:
                chosen, equal = on_or_off(candidates, scores, budget, generator)
                ranks |= chosen
                tied += equal
        remark = f"chance decided between {len(tied)} sites of equal score" if tied else ""
        return Revision({c.name: _first(ranks[c.name], c.ranks) for c in context.candidates}, scores, remark)

    def _rankings(self, candidates: Sequence[Candidate]) -> list[tuple[list[Candidate], Budget]]:
        """Return what is ranked together, with its budget: ⌊p·N⌋ of linear sites, round(p·M) of shortcuts."""
        linear = [candidate for candidate in candidates if not candidate.site.edge]
        edges = [candidate for candidate in candidates if candidate.site.edge]
        budgets = share_of(linear, self.share, self.unit), share_of(edges, self.share, self.unit, rounded=True)
        if self.separate_rankings and edges:
            return list(zip((linear, edges), budgets, strict=True))
        return [(list(candidates), Budget(sum(budget.amount for budget in budgets), self.unit))]

    @property
    def _scoring(self) -> Scoring:
        return Scoring(
            of=self.score_target,
            mean_of_norms=self.gradient == "mean_of_norms",
            normalize=self.normalize,
            init=self.scoring_init,
            tolerance=self.tolerance,
            synflow=self.synflow,
        )

    def _blind(self, context: ScoringContext) -> str:
        text = f"{self.proxy} gives all {len(context.candidates)} sites the score 0, so it cannot choose between them"
        if self.proxy in _BLIND:
            text += ": under B = 0 it always does. Take grad_norm, or scoring_init random, or warm_up, or of frozen"
        return text


def _first(open_ranks: int, ranks: int) -> torch.Tensor:
    return (torch.arange(ranks) < open_ranks).float()


def _check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{name} is {value!r}: choose {', '.join(known)}.{nearest(str(value), known)}")


REGISTRY.add(
    Method(
        name="hetero",
        axis=Axis.ALLOCATION,
        options=HeteroLoRA,
        summary="the ranks go to the sites, and shortcuts if asked for, that a zero-cost proxy ranks highest",
        paper="arXiv 2406.14956",
        parameters="–",
        needs=frozenset({Capability.GATES, Capability.SHRINKS}),
    )
)
