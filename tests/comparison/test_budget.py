"""Ranks from a budget: never above it, within 2 %, every trained parameter counted, the scale kept."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.comparison.budget_matching import Counter, Solved, fixed, parse_budget, parse_match, solve, spread
from loraplex.comparison.compare import kept_to_budget
from loraplex.comparison.results import Run
from loraplex.errors import UserError
from loraplex.models.loading import load_model
from loraplex.training.preparation import adapter_config, add_adapter
from loraplex.training.reading import read_recipe
from loraplex.training.recipe import Recipe


@pytest.fixture
def recipe(tiny_recipe: Path) -> Recipe:
    return read_recipe(tiny_recipe, ["--adapter.r", "8", "--adapter.lora_alpha", "16"])


def arm(recipe: Recipe, **adapter: Any) -> Recipe:
    return dataclasses.replace(recipe, adapter=dataclasses.replace(recipe.adapter, **adapter))


@pytest.mark.parametrize("adapter", [{"adapter": "lora"}, {"adapter": "dora"}])
@pytest.mark.parametrize("budget", [2500, 4999, 10_000, 23_456])
def test_the_budget_is_met_and_never_exceeded(recipe: Recipe, adapter: dict[str, Any], budget: int) -> None:
    solved = solve(arm(recipe, **adapter), budget, Counter(recipe))
    assert budget * 0.98 <= solved.trainable <= budget
    assert solved.within_budget
    # The count without weights is that of the model that is trained.
    model = add_adapter(solved.recipe, load_model(recipe.model.name, "float32"))
    assert model.get_nb_trainable_parameters()[0] == solved.trainable
    ranks = {layer.adapter("default").factors.rank for layer in model.base_model.site_layers()}
    assert len(ranks) <= 2
    assert max(ranks) - min(ranks) <= 1
    scales = {round(layer.adapter("default").factors.scale, 9) for layer in model.base_model.site_layers()}
    assert scales == {2.0}


def test_stock_lora_gets_the_same_ranks(recipe: Recipe) -> None:
    counter = Counter(recipe)
    stock = dataclasses.replace(recipe, adapter=None, peft={"peft_type": "LORA", "lora_alpha": 16})
    ours, theirs = solve(recipe, 5000, counter), solve(stock, 5000, counter)
    assert ours.trainable == theirs.trainable
    assert theirs.recipe.peft["rank_pattern"] == ours.recipe.adapter.rank_pattern


@pytest.mark.parametrize(
    "allocation",
    [
        {"name": "hetero", "share": 0.25, "unit": "parameters", "ranks": "proportional"},
        {"name": "hetero", "share": 0.5, "unit": "modules"},
        {"name": "alora", "unit": "parameters", "growth": 2},
        {"name": "alora", "growth": 2},
    ],
)
def test_the_budget_of_an_allocation_is_what_it_leaves(recipe: Recipe, allocation: dict[str, Any]) -> None:
    counter = Counter(recipe)
    solved = solve(arm(recipe, allocation=allocation), 4000, counter)
    assert 4000 * 0.98 <= solved.trainable <= 4000
    assert solved.within_budget
    share = allocation.get("share", 0.5)
    assert solved.candidates == pytest.approx(solved.trainable / share, rel=1e-3)
    model = add_adapter(solved.recipe, load_model(recipe.model.name, "float32"))
    assert model.get_nb_trainable_parameters()[0] == solved.candidates
    scales = {round(layer.adapter("default").factors.scale, 9) for layer in model.base_model.site_layers()}
    assert scales == {2.0}
    # plain LoRA of the same budget is as large, and has no candidates beside
    plain = solve(recipe, 4000, counter)
    assert plain.candidates is None
    assert abs(plain.trainable - solved.trainable) <= 0.02 * 4000


def test_a_plan_keeps_its_ranks_whatever_the_budget(recipe: Recipe) -> None:
    plan = {"model.layers.0.self_attn.q_proj": 3, "model.layers.1.mlp.up_proj": 5}
    given = arm(recipe, allocation={"name": "uniform", "plan": plan})
    for budget in (100, 10_000):
        solved = solve(given, budget, Counter(recipe))
        assert (solved.recipe, solved.within_budget) == (given, False)
        assert solved.trainable == 3 * (32 + 32) + 5 * (32 + 48)


def stock_adalora(recipe: Recipe, **section: Any) -> Recipe:
    return dataclasses.replace(recipe, adapter=None, peft={"peft_type": "ADALORA", "total_step": 50, **section})


def test_adalora_is_solved_for_the_ranks_that_it_ends_with(recipe: Recipe) -> None:
    counter = Counter(recipe)
    sites = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    budget = 5 * (sites + 14)
    solved = solve(stock_adalora(recipe, lora_alpha=24), budget + 30, counter)
    # PEFT's own proportion, 12 to 8; A, B and the singular values of the five ranks that a site has on average
    assert {key: solved.recipe.peft[key] for key in ("target_r", "init_r")} == {"target_r": 5, "init_r": 8}
    assert (solved.trainable, solved.candidates) == (budget, 8 * (sites + 14))
    assert solved.within_budget
    # alpha over the initial rank stays
    assert solved.recipe.peft["lora_alpha"] == 24 * 8 / 12
    assert solve(stock_adalora(recipe, init_r=16), budget, counter).recipe.peft["init_r"] == 10
    # LoRA of rank 5 costs no singular values: they are no reason for rank 4
    beside_lora = solve(stock_adalora(recipe), 5 * sites, counter)
    assert (beside_lora.recipe.peft["target_r"], beside_lora.within_budget) == (5, True)
    # a whole rank at every site is a large step
    between = solve(stock_adalora(recipe), round(budget * 1.1), counter)
    assert (between.recipe.peft["target_r"], between.within_budget) == (5, False)
    named = stock_adalora(recipe, target_r=2, init_r=3)
    own = solve(named, budget, counter)
    assert (own.recipe, own.trainable, own.within_budget) == (named, 2 * (sites + 14), False)


def test_what_an_allocation_has_left_decides_whether_it_kept_to_the_budget(recipe: Recipe) -> None:
    def runs(*left: int | None) -> list[Run]:
        return [Run(seed, "finished", "", trainable=9000, deployed=found) for seed, found in enumerate(left)]

    moving = Solved(recipe, 1000, True, candidates=9000)
    assert kept_to_budget(moving, runs(990, 1010), 1000)
    assert not kept_to_budget(moving, runs(990, 1100), 1000)
    assert not kept_to_budget(moving, runs(990, 900), 1000)
    assert kept_to_budget(moving, runs(None), 1000)
    assert kept_to_budget(Solved(recipe, 1000, True), runs(9000), 1000)
    assert [run.parameters for run in runs(990, None)] == [990, 9000]


def test_what_cannot_spend_the_budget_says_so(recipe: Recipe) -> None:
    counter = Counter(recipe)
    assert not solve(recipe, 100, counter).within_budget
    vera = dataclasses.replace(recipe, adapter=None, peft={"peft_type": "VERA", "target_modules": ["q_proj"]})
    assert not solve(vera, 50_000, counter).within_budget
    # Beyond rank 32 of the narrowest site.
    assert solve(recipe, 500_000, counter).recipe.adapter.r == 32
    named = dataclasses.replace(recipe, adapter=None, peft={"peft_type": "LORA", "r": 1})
    solved = solve(named, 50_000, counter)
    assert (solved.within_budget, solved.recipe) == (False, named)
    assert fixed(recipe, None, counter).within_budget


def test_the_same_arm_gets_the_same_plan(recipe: Recipe) -> None:
    assert solve(recipe, 7777, Counter(recipe)) == solve(recipe, 7777, Counter(recipe))


@given(st.integers(1, 300), st.integers(0, 300))
def test_extra_ranks_are_spread_evenly(sites: int, count: int) -> None:
    names = [str(index) for index in range(sites)]
    chosen = spread(names, min(count, sites))
    assert len(chosen) == min(count, sites)
    if chosen:
        gaps = [int(b) - int(a) for a, b in itertools.pairwise(chosen)]
        assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("text", "expected"), [("0.5%", 5000), ("1.2M", 1_200_000), ("3k", 3000), (12345, 12345), ("2 B", 2 * 10**9)]
)
def test_budgets_are_read(text: str | int, expected: int) -> None:
    assert parse_budget(text, 1_000_000) == expected


@pytest.mark.parametrize("text", ["", "much", "-3", "0", "0%", "1.2.3M"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="budget is"):
        parse_budget(text, 1_000_000)


def test_match_names_an_adapter(recipe: Recipe) -> None:
    config = adapter_config(parse_match("dora r=5 lora_alpha=7", recipe))
    assert (config.adapter.name, config.r, config.lora_alpha) == ("dora", 5, 7)
    for text, message in (("lorra r=3", "Did you mean 'lora'"), ("lora 3", "such as 'lora r=16'")):
        with pytest.raises(UserError, match=message):
            parse_match(text, recipe)
