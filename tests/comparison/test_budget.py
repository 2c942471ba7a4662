"""Ranks from a budget: never above it, within 2 %, every trained parameter counted, the scale kept."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.comparison.budget import Counter, fixed, parse_budget, parse_match, solve, spread
from loraplex.errors import UserError
from loraplex.models.loading import load_model
from loraplex.training.preparation import adapter_config, add_adapter
from loraplex.training.reading import read_recipe
from loraplex.training.recipe import Recipe


@pytest.fixture
def recipe(tiny_recipe: Path) -> Recipe:
    return read_recipe(tiny_recipe, ["--adapter.r", "8", "--adapter.alpha", "16"])


def arm(recipe: Recipe, **adapter: Any) -> Recipe:
    return dataclasses.replace(recipe, adapter={**recipe.adapter, **adapter})


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
    stock = dataclasses.replace(recipe, adapter={}, peft={"peft_type": "LORA", "lora_alpha": 16})
    ours, theirs = solve(recipe, 5000, counter), solve(stock, 5000, counter)
    assert ours.trainable == theirs.trainable
    assert theirs.recipe.peft["rank_pattern"] == ours.recipe.adapter["rank_pattern"]


def test_what_cannot_spend_the_budget_says_so(recipe: Recipe) -> None:
    counter = Counter(recipe)
    assert not solve(recipe, 100, counter).within_budget
    vera = dataclasses.replace(recipe, adapter={}, peft={"peft_type": "VERA", "target_modules": ["q_proj"]})
    assert not solve(vera, 50_000, counter).within_budget
    # Beyond rank 32 of the narrowest site.
    assert solve(recipe, 500_000, counter).recipe.adapter["r"] == 32
    named = dataclasses.replace(recipe, adapter={}, peft={"peft_type": "LORA", "r": 1})
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
    config = adapter_config(parse_match("dora r=5 alpha=7", recipe))
    assert (config.adapter, config.r, config.alpha) == ("dora", 5, 7)
    for text, message in (("lorra r=3", "Did you mean 'lora'"), ("lora 3", "such as 'lora r=16'")):
        with pytest.raises(UserError, match=message):
            parse_match(text, recipe)
