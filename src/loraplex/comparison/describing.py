"""Arms and data in a few words, as the report and the terminal show them."""

from __future__ import annotations

from typing import Any

from loraplex.training.recipe import Recipe, TrainingOptions
from loraplex.tuner.config import AdapterConfig


def describe(recipe: Recipe, common: TrainingOptions) -> str:
    """Return an arm in a few words: the adapter, its rank, and where its training differs from the reference's."""
    section: dict[str, Any] = recipe.peft or vars(recipe.adapter or AdapterConfig())
    words = [recipe.adapter_name]
    if "target_r" in section:
        words.append(f"target_r={section['target_r']} init_r={section.get('init_r', 'default')}")
    elif (rank := section.get("r")) is not None:
        uneven = len({rank, *section.get("rank_pattern", {}).values()}) > 1
        words.append(f"r={rank}{'–' + str(rank + 1) if uneven else ''}")
    for key, value in vars(recipe.training).items():
        if value != getattr(common, key):
            words.append(f"{key}={value}")
    return " ".join(words)


def sources(recipe: Recipe) -> str:
    """Return where the rows come from, in a line."""
    trained = " and ".join(recipe.data.sources("train"))
    if recipe.data.test_share:
        return f"{trained}, tested on {recipe.data.test_share:.0%} of the items"
    return trained if recipe.data.test is None else f"{trained}, tested on {' and '.join(recipe.data.sources('test'))}"
