"""A thousand random revisions of ALoRA: the budget holds, what opens has no effect yet, a kind moves as one."""

import functools
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tests.tuner.tiny_models import config, llama

from loraplex import ALoRA
from loraplex.tuner.candidates import candidates_of


@functools.cache
def candidates(adapter: str):
    model = get_peft_model(llama(), config(adapter=adapter, r=3, allocation=ALoRA(growth=3)))
    return candidates_of(model.base_model, "default")


def trained(candidate) -> None:
    """What is open has been trained: its B is no longer zero."""
    with torch.no_grad():
        candidate.adapter.factors.lora_B[:, candidate.gate.bool()] = 0.1


@settings(max_examples=100, deadline=None)
@given(
    by=st.sampled_from(("site", "kind")),
    unit=st.sampled_from(("ranks", "parameters")),
    adapter=st.sampled_from(("lora", "dora")),
    pruned=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_the_budget_holds_over_ten_rounds(by: str, unit: str, adapter: str, pruned: int, seed: int) -> None:
    draw, every = random.Random(seed), candidates(adapter)
    allocator = ALoRA(group_by=by, unit=unit, ranks_per_round=pruned, growth=3)
    start, budget = allocator.start(every, lambda site: draw.choice((1, 3)) if by == "site" else 3)
    for candidate in every:
        candidate.gate.copy_(start[candidate.name])
        torch.nn.init.zeros_(candidate.adapter.factors.lora_B)
    assert budget.spent(every, {name: int(gate.sum()) for name, gate in start.items()}) == budget.amount
    for _ in range(10):
        for candidate in every:
            trained(candidate)
        groups = allocator.groups(every)
        scores = {(g, int(k)): draw.gauss(0, 1) for g, members in groups.items() for k in members[0].gate.nonzero()}
        revision = allocator.moved(every, budget, scores)
        assert budget.spent(every, revision.plan.ranks) <= budget.amount
        worst = sorted(scores, key=scores.__getitem__)[:pruned]
        for candidate in every:
            gate, before = revision.gates[candidate.name], candidate.gate
            opened = (gate == 1) & (before == 0)
            assert not candidate.adapter.factors.lora_B[:, opened].any()
            group = candidate.name if by == "site" else candidate.site.kind
            closed = {int(k) for k in ((gate == 0) & (before == 1)).nonzero()}
            assert closed == {rank for name, rank in worst if name == group}
            assert not (closed and opened.any())
        for members in groups.values():
            assert all(torch.equal(revision.gates[c.name], revision.gates[members[0].name]) for c in members)
        for candidate in every:
            candidate.gate.copy_(revision.gates[candidate.name])


def test_a_site_that_gains_a_rank_in_every_round_has_room_for_it_and_no_more() -> None:
    """Four sites of 14 win all rounds, one rank each: they end with what was built."""
    allocator = ALoRA(rounds=5, ranks_per_round=4)
    model = get_peft_model(llama(), config(adapter="lora", r=6, allocation=allocator))
    every = candidates_of(model.base_model, "default")
    start, budget = allocator.start(every, lambda site: 6)
    winners = {candidate.name for candidate in every[:4]}
    for candidate in every:
        candidate.gate.copy_(start[candidate.name])
    for _ in range(allocator.rounds):
        for candidate in every:
            trained(candidate)
        scores = {(c.name, int(k)): float(c.name in winners) for c in every for k in c.gate.nonzero()}
        revision = allocator.moved(every, budget, scores)
        assert not revision.remark
        for candidate in every:
            candidate.gate.copy_(revision.gates[candidate.name])
    assert {c.name for c in every if c.gate.all()} == winners
    assert {c.ranks for c in every} == {11}
