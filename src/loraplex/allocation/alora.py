"""ALoRA, allocating LoRA: ranks that hurt least when they go are pruned, and as many open elsewhere.

Not to be confused with PEFT's alora_* options, which are activated LoRA. Paper: Liu et al., ALoRA: Allocating Low-Rank
Adaptation for Fine-tuning Large Language Models, arXiv 2403.16187, sections 3.2 and 3.3, algorithm 1:
    IS(r) = S(M) − S(M without r) + S(M with r alone),  S = −cross-entropy on one fixed batch.
A round closes the n_A ranks with the lowest IS; the modules that lost none share n_A new ranks as evenly as possible,
the remainder going to those with the highest mean IS. A new rank starts with B = 0 and changes nothing; the scale s
stays that of the initial rank. Where every module has lost a rank nothing is added. Room for new ranks, which
the paper does not bound, is built at the start: one for each round, which is what a module gets at most where more
modules are spared than ranks move, or up to `growth` times the initial rank. The budget is what the initial ranks
cost: their number, as the paper counts, or their parameters, which ranks that move to wider modules may not exceed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.adapters.registry import REGISTRY, Axis, Capability, Method
from loraplex.allocation.budget import Budget
from loraplex.allocation.contracts import Allocator, Candidate, Gates, Revision, ScoringContext
from loraplex.allocation.proxies import mean_over_processes, widest
from loraplex.errors import UserError
from loraplex.models.modes import evaluation_mode
from loraplex.option_values import is_number, is_whole

Scores = Mapping[tuple[str, int], float]
"""IS by (group, rank): the group is a site, or a kind of module whose sites share their ranks."""


@dataclass(frozen=True)
class ALoRA(Allocator):
    """Options of ALoRA; those of the paper are the defaults, where it names them."""

    delay = "warmup_epochs"
    rounds: int = 8
    """N_A: how often ranks are pruned and given anew."""
    ranks_per_round: int | None = None
    """n_A: ranks that move in a round; as many as there are kinds of module when absent (the paper's q, k, … count)."""
    warmup_epochs: float = 1.0
    """K1: epochs before the first round."""
    interval_epochs: float = 0.25
    """K2: epochs between rounds."""
    in_steps: bool = False
    """Read `warmup_epochs` and `interval_epochs` as optimizer steps."""
    group_by: str = "site"
    """What a rank is: rank k of one "site", or of all sites of a "kind" at once (112 passes a round, not 3,584)."""
    growth: float | None = None
    """Largest rank of a site as a multiple of the initial one; when absent every round has room for one more rank."""
    batches: int = 1
    """Batches that ranks are scored on; the paper takes one of 32 validation rows."""
    unit: str = "ranks"
    """What never grows: the number of open "ranks", as in the paper, or of their "parameters"."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.group_by not in ("site", "kind"):
            raise UserError(f"group_by is {self.group_by!r}: choose 'site' or 'kind'")
        if self.unit not in ("ranks", "parameters"):
            raise UserError(f"unit is {self.unit!r}: choose 'ranks' or 'parameters'")
        if not isinstance(self.in_steps, bool):
            raise UserError(f"in_steps is {self.in_steps!r}: give true or false")
        for name in ("rounds", "batches", *(["ranks_per_round"] if self.ranks_per_round is not None else [])):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise UserError(f"{name} is {value!r}: give a whole number of at least 1")
        for name, least in (
            ("warmup_epochs", 0),
            ("interval_epochs", 0),
            *([("growth", 1)] if self.growth is not None else []),
        ):
            value = getattr(self, name)
            if not is_number(value) or not least <= value < float("inf"):
                raise UserError(f"{name} is {value!r}: give a number of at least {least}")

    def nothing_left(self, budget: Budget) -> str:
        """Return that so many ranks were taken."""
        what = f"ranks_per_round is {self.ranks_per_round} of {budget}"
        return f"{what}, so a round takes the last rank of every site: lower it"

    def allocated_rank(self, rank: int) -> int:
        """Return r + rounds, or r·growth, rounded down."""
        return rank + self.rounds if self.growth is None else int(rank * self.growth)

    def due(self, total_steps: int, steps_per_epoch: int) -> Sequence[int]:
        """Return the steps of the rounds that come before the end of training."""
        unit = 1 if self.in_steps else steps_per_epoch
        steps = [round((self.warmup_epochs + number * self.interval_epochs) * unit) for number in range(self.rounds)]
        return [step for step in dict.fromkeys(steps) if step < total_steps]

    def start(self, candidates: Sequence[Candidate], rank: Callable[[str], int]) -> tuple[Gates, Budget]:
        """Return the configured ranks open and the room for new ones closed; what they cost is the budget."""
        gates = {c.name: (torch.arange(c.ranks) < rank(c.name)).float() for c in candidates}
        open_ranks = {name: int(gate.sum()) for name, gate in gates.items()}
        return gates, Budget(Budget(0, self.unit).spent(candidates, open_ranks), self.unit)

    def revise(self, context: ScoringContext) -> Revision:
        """Prune and give anew, one round."""
        return self.moved(context.candidates, context.budget, _importance(context, self.groups(context.candidates)))

    def moved(self, candidates: Sequence[Candidate], budget: Budget, scores: Scores) -> Revision:
        """Return the gates after a round; `scores` are those of every open rank by (group, rank)."""
        groups = self.groups(candidates)
        moving = self.ranks_per_round or len({candidate.site.kind for candidate in candidates})
        gates = {candidate.name: candidate.gate.detach().cpu().clone() for candidate in candidates}
        worst = sorted(scores, key=lambda entry: (scores[entry], entry))[:moving]
        for group, rank in worst:
            for candidate in groups[group]:
                gates[candidate.name][rank] = 0
        lost = {group for group, _ in worst}
        spared = [group for group in groups if group not in lost]
        missing = self._give(budget, groups, scores, gates, spared, len(worst))
        named = {f"{group}[{rank}]": value for (group, rank), value in scores.items()}
        remark = f"{missing} of {len(worst)} ranks were not given anew: no room is left, or the budget does not pay"
        if not spared:
            remark = "every module lost a rank, so none was given anew"
        return Revision(gates, named, remark if missing else "")

    def groups(self, candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
        """Return what shares a gate: the site alone, or all sites of its kind."""
        groups: dict[str, list[Candidate]] = {}
        for candidate in candidates:
            groups.setdefault(candidate.name if self.group_by == "site" else candidate.site.kind, []).append(candidate)
        for kind, members in groups.items():
            if len({candidate.ranks for candidate in members}) > 1:
                raise UserError(
                    f"the sites of kind '{kind}' have different ranks, but group_by: kind gives them one gate"
                )
        return groups

    def _give(
        self,
        budget: Budget,
        groups: Mapping[str, list[Candidate]],
        scores: Scores,
        gates: dict[str, Tensor],
        spared: Sequence[str],
        new_ranks: int,
    ) -> int:
        """Open `new_ranks` ranks in the groups that lost none, while the budget pays for them; return what is left."""
        every = [candidate for members in groups.values() for candidate in members]
        left = budget.amount - sum(budget.price(c, int(gates[c.name].sum())) for c in every)
        means = {group: _mean([v for (name, _), v in scores.items() if name == group]) for group in spared}
        order = sorted(spared, key=lambda group: (-means[group], group))
        # opening one of these changes nothing
        untrained = {c.name: c.adapter.factors.at_start().cpu() for group in spared for c in groups[group]}
        while new_ranks and order:
            for group in list(order):
                names = [candidate.name for candidate in groups[group]]
                fresh = {name: ((gates[name] == 0) & untrained[name]).nonzero().flatten().tolist() for name in names}
                price = sum(_price_of_one_more(budget, candidate, gates[candidate.name]) for candidate in groups[group])
                if not all(fresh.values()) or price > left:
                    # full, or dearer than what is left: a kind opens in all its sites or in none
                    order.remove(group)
                    continue
                for name, ranks in fresh.items():
                    gates[name][ranks[0]] = 1
                left, new_ranks = left - price, new_ranks - 1
                if not new_ranks:
                    break
        return new_ranks


def _price_of_one_more(budget: Budget, candidate: Candidate, gate: Tensor) -> int:
    now = int(gate.sum())
    return budget.price(candidate, now + 1) - budget.price(candidate, now)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("-inf")


@torch.no_grad()
def _importance(context: ScoringContext, groups: Mapping[str, list[Candidate]]) -> dict[tuple[str, int], float]:
    """Return IS of every open rank by (group, rank); 2·(open ranks) + 1 passes over the batches."""
    kept = {candidate.name: candidate.gate.clone() for candidate in context.candidates}
    open_ranks = [(g, int(k)) for g, members in groups.items() for k in members[0].gate.nonzero().flatten()]
    context.say(
        f"AB-LoRA: {len(open_ranks)} ranks, {2 * len(open_ranks) + 1} passes over {len(context.batches)} batches"
    )

    def fidelity() -> float:
        loss = torch.stack([widest(context.loss_alone(batch)) for batch in context.batches]).mean()
        mean_over_processes([loss])
        return -float(loss)

    def put_back() -> None:
        for candidate in context.candidates:
            candidate.gate.copy_(kept[candidate.name])

    try:
        with evaluation_mode(context.model):
            whole, found = fidelity(), {}
            for group, rank in open_ranks:
                for candidate in groups[group]:
                    candidate.gate[rank] = 0
                without = fidelity()
                for candidate in context.candidates:
                    candidate.gate.zero_()
                for candidate in groups[group]:
                    candidate.gate[rank] = 1
                found[group, rank] = whole - without + fidelity()
                put_back()
        return found
    finally:
        put_back()


REGISTRY.add(
    Method(
        name="alora",
        axis=Axis.ALLOCATION,
        options=ALoRA,
        summary="ranks move in rounds to where their loss shows they are missed (allocating, not activated LoRA)",
        paper="arXiv 2403.16187",
        parameters="–",
        needs=frozenset({Capability.GATES, Capability.SHRINKS}),
    )
)
