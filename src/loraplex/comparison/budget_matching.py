"""Ranks from a parameter budget: the whole trainable part of an arm is counted, on the model without its weights.

What is counted is what an arm deploys: the tensors of an objective, which are gone after training, are not, and of an
allocation it is what the final budget leaves, not the candidates. The same goes for AdaLoRA of stock PEFT: its target_r
is solved, and init_r keeps its proportion to it.

With every site at rank r or r + 1 the count comes within a site's step of the budget. Which sites get the extra rank is
decided by position alone: k of n sites, evenly spread in the order of the model's modules, so the same arm always gets
the same plan. A site's scale s stays what the arm says at its own rank: alpha moves with the rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from transformers import PretrainedConfig

from loraplex.adapters.contracts import scaling
from loraplex.allocation.sites import is_edge
from loraplex.compat.peft import BaseTunerLayer
from loraplex.errors import UserError, nearest
from loraplex.training.estimate import build_without_weights, model_config
from loraplex.training.preparation import adapter_config
from loraplex.training.recipe import Recipe
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.counting import count_parameters

# An arm within this share of the budget counts as on it.
TOLERANCE = 0.02
LARGEST_RANK = 1 << 14
_AMOUNT = re.compile(r"([0-9]*\.?[0-9]+)\s*([kKmMbB%]?)")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@dataclass(frozen=True)
class Solved:
    """An arm's recipe with its ranks, and what it trains."""

    recipe: Recipe
    trainable: int
    """Parameters at the end of training; of a budget in ranks or modules those where all sites are chosen alike."""
    within_budget: bool
    candidates: int | None = None
    """All that is trained at some time, where an allocation leaves less."""


@dataclass(frozen=True)
class _Count:
    final: int
    trained: int
    total: int
    sites: list[str]


class Counter:
    """Parameters of recipes on one base model; nothing is counted twice."""

    def __init__(self, recipe: Recipe) -> None:
        config, dtype = model_config(recipe)
        self._config: PretrainedConfig = config
        self._dtype: torch.dtype = dtype
        self._found: dict[str, _Count] = {}

    def trainable(self, recipe: Recipe) -> int:
        """Return the number of parameters that are trained and left at the end, whatever kind they are."""
        return self._count(recipe).final

    def candidates(self, recipe: Recipe) -> int | None:
        """Return the number of parameters that are trained at some time, None where that is the same."""
        found = self._count(recipe)
        return found.trained if found.trained != found.final else None

    def total(self, recipe: Recipe) -> int:
        """Return the number of parameters of the base model."""
        found = self._count(recipe)
        return found.total - found.trained

    def sites(self, recipe: Recipe) -> list[str]:
        """Return the names of the adapted modules in the order of the model."""
        return self._count(recipe).sites

    def _count(self, recipe: Recipe) -> _Count:
        if recipe.adapter is not None:
            recipe = replace(recipe, adapter=replace(recipe.adapter, objective=AdapterConfig().objective))
        key = repr((recipe.adapter, recipe.peft, recipe.training.max_steps))
        if key not in self._found:
            model = build_without_weights(recipe, self._config, self._dtype)
            counted = count_parameters(model)
            modules = model.get_base_model().named_modules()
            adapted = [name for name, module in modules if isinstance(module, BaseTunerLayer) and not is_edge(name)]
            final, target = counted.kept, _target(recipe)
            if target is not None and target.get("init_r") != recipe.peft.get("init_r"):
                final = self._count(replace(recipe, peft=target)).trained
            self._found[key] = _Count(final, counted.trainable, counted.total, adapted)
        return self._found[key]


def _target(recipe: Recipe) -> dict[str, Any] | None:
    """Return the section of an adapter of PEFT that has from the start the ranks that it would end with, if it has."""
    target = getattr(adapter_config(recipe), "target_r", None) if recipe.peft else None
    return None if target is None else {**recipe.peft, "init_r": target}


def parse_budget(text: str | float, model_parameters: int) -> int:
    """Return the number of parameters that "0.5%" of the model, "1.2M" or a plain number is.

    Raises:
        UserError: for anything else, or for nothing at all.
    """
    match = _AMOUNT.fullmatch(str(text).strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"budget is {text!r}: give a share of the model (0.5%), an amount (1.2M) or a number above 0")
    amount, unit = float(match[1]), match[2].lower()
    return round(amount / 100 * model_parameters if unit == "%" else amount * _UNITS[unit])


def parse_match(text: str, shared: Recipe) -> Recipe:
    """Return the recipe whose parameters are the budget: "lora r=16" over the shared recipe.

    Raises:
        UserError: when the text is not an adapter's name with options.
    """
    name, *options = text.split()
    section: dict[str, Any] = {} if shared.adapter is None else {"target_modules": shared.adapter.target_modules}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"match is '{text}': write an adapter and its options, such as 'lora r=16'")
        section[key] = int(value) if value.lstrip("-").isdigit() else value
    for key in section:
        if key not in AdapterConfig.own_fields():
            raise UserError(
                f"match is '{text}': an adapter has no option '{key}'.{nearest(key, AdapterConfig.own_fields())}"
            )
    return replace(shared, adapter=AdapterConfig(**{**section, "adapter": name}), peft={})


def solve(recipe: Recipe, budget: int, counter: Counter) -> Solved:
    """Return the recipe with the largest ranks that the budget pays for.

    An adapter whose count does not follow r comes back as it is, and one that costs more than the budget at its lowest
    rank at that rank.
    """
    if not _has_rank(recipe):
        return fixed(recipe, budget, counter)
    lowest = _lowest_rank(recipe, counter)
    if counter.trainable(_at(recipe, lowest)) > budget:
        return fixed(_at(recipe, lowest), budget, counter)
    limit = _largest(lambda r: _fits(_at(recipe, r), budget, counter), LARGEST_RANK, lowest)
    if limit == LARGEST_RANK:
        return fixed(recipe, budget, counter)
    sites = counter.sites(_at(recipe, limit))
    if not _has_pattern(recipe):
        at_limit, above = (_at(recipe, rank) for rank in (limit, limit + 1))
        # its singular values, which LoRA of the same rank has not, must not cost it a whole rank at every site
        nearer = _target(recipe) is not None and keeps_to(counter.trainable(above), budget)
        return fixed(above if nearer else at_limit, budget, counter)
    extra = _largest(lambda k: _fits(_at(recipe, limit, spread(sites, k)), budget, counter), len(sites) - 1)
    return fixed(_at(recipe, limit, spread(sites, extra)), budget, counter)


def fixed(recipe: Recipe, budget: int | None, counter: Counter) -> Solved:
    """Return the recipe as it is with its count."""
    trainable = counter.trainable(recipe)
    return Solved(recipe, trainable, keeps_to(trainable, budget), counter.candidates(recipe))


def keeps_to(parameters: int, budget: int | None) -> bool:
    """Tell whether a number of parameters counts as on the budget; where there is none, any does."""
    return budget is None or abs(parameters - budget) <= TOLERANCE * budget


def spread(sites: Sequence[str], count: int) -> list[str]:
    """Return `count` of the sites at even distances."""
    return [site for i, site in enumerate(sites) if (i + 1) * count // len(sites) > i * count // len(sites)]


def _lowest_rank(recipe: Recipe, counter: Counter) -> int:
    """Return the smallest rank that the method takes: PRoLoRA's must be as large as the part it does not share."""
    rank, config = 1, cast(Any, adapter_config(recipe))
    while True:
        try:
            counter.trainable(_at(recipe, rank))
            return rank
        except UserError:
            # no rank is legal where the recipe's own is not
            if rank >= config.r:
                raise
        rank += 1


def _largest(fits: Callable[[int], bool], limit: int, low: int = 0) -> int:
    """Return the largest number from `low` to `limit` that fits, where all from `low` on do; `low` is not tried."""
    high = max(1, 2 * low)
    while high <= limit and fits(high):
        low, high = high, high * 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(recipe: Recipe, budget: int, counter: Counter) -> bool:
    try:
        return counter.trainable(recipe) <= budget
    except UserError:
        # The rank is above what a site of this model can have.
        return False


def _has_rank(recipe: Recipe) -> bool:
    config = adapter_config(recipe)
    if isinstance(config, AdapterConfig):
        # a plan's ranks are what they are
        return config.allocation.given is None
    name = "target_r" if hasattr(config, "target_r") else "r"
    return hasattr(config, name) and name not in recipe.peft


def _has_pattern(recipe: Recipe) -> bool:
    config = adapter_config(recipe)
    # AdaLoRA's is what it found, not what it is to do.
    return hasattr(config, "rank_pattern") and not hasattr(config, "target_r")


def _at(recipe: Recipe, rank: int, one_more: Sequence[str] = ()) -> Recipe:
    """Return the recipe with its rank replaced and its scale kept; `one_more` are sites with one rank more."""
    config: Any = adapter_config(recipe)
    if isinstance(config, AdapterConfig):
        scale = config.adapter.factors.scale
        ranks = _ranks(config.lora_alpha, config.r, scale, rank, one_more)
        return replace(recipe, adapter=replace(recipe.adapter or AdapterConfig(), **ranks))
    if hasattr(config, "target_r"):
        # above the target, or nothing could be pruned; its scale is alpha over the initial rank
        initial = max(rank + 1, round(rank * config.init_r / config.target_r))
        alpha = config.lora_alpha * initial / config.init_r
        return replace(recipe, peft={**recipe.peft, "target_r": rank, "init_r": initial, "lora_alpha": alpha})
    alpha = getattr(config, "lora_alpha", None)
    if alpha is None:
        return replace(recipe, peft={**recipe.peft, "r": rank})
    own: int = config.r
    scale = partial(scaling, use_rslora=getattr(config, "use_rslora", False))
    ranks = _ranks(alpha, own, scale, rank, one_more)
    return replace(recipe, peft={**recipe.peft, **ranks})


def _ranks(
    alpha: float, r: int, scale: Callable[[float, int], float], rank: int, one_more: Sequence[str]
) -> dict[str, Any]:
    """Return the keys that set the ranks, with every alpha such that scale(alpha, rank) is scale(alpha, r)."""

    def alpha_at(other: int) -> float:
        return alpha * scale(1, r) / scale(1, other)

    keys: dict[str, Any] = {"r": rank, "lora_alpha": alpha_at(rank)}
    if one_more:
        names = [re.escape(site) for site in one_more]
        keys["rank_pattern"] = dict.fromkeys(names, rank + 1)
        keys["alpha_pattern"] = dict.fromkeys(names, alpha_at(rank + 1))
    return keys
