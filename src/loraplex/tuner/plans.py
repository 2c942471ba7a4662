"""A plan as input: the ranks that an allocation gives become part of the adapter's configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any, cast

from torch import nn

from loraplex.allocation.sites import is_edge
from loraplex.compat.peft import INCLUDE_LINEAR_LAYERS_SHORTHAND
from loraplex.errors import UserError, nearest
from loraplex.tuner.options import AdapterOptions
from loraplex.tuner.sites import find_sites, module_names, namesakes


def follow_plan(model: nn.Module, config: AdapterOptions) -> None:
    """Adapt exactly the sites that the plan of `config`'s allocation gives a rank, with these ranks.

    The scale of a site stays what it is at the configured rank, s = scale(alpha, r): alpha moves with the rank. What
    is injected, saved and resumed afterwards is a configuration like any other. Without a plan nothing changes; with
    `target_modules` absent, every linear layer may be in the plan.

    Raises:
        UserError: when the plan names a site that model and config do not have; the nearest is named.
    """
    plan = config.allocation.given
    if plan is None:
        return
    every = copy(config)
    if every.target_modules is None:
        every.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
    sites = [site.name for site in find_sites(model, every)]
    for name, rank in plan.ranks.items():
        # an edge without a rank is no site
        if name not in sites and (rank or not is_edge(name)):
            raise UserError(
                f"the plan names '{name}', which is none of the {len(sites)} sites that target_modules selects in "
                f"this model.{nearest(name, sites)}"
            )
    ranks = {name: plan.ranks[name] for name in sites if plan.ranks.get(name)}
    if all(map(is_edge, ranks)):
        raise UserError("the plan gives no linear layer a rank above 0, and PEFT makes no adapter without one")
    adapt_exactly(config, ranks, module_names(model))
    config.allocation = config.allocation.without_given()


def adapt_exactly(config: AdapterOptions, ranks: Mapping[str, int], modules: Iterable[str]) -> None:
    """Make `config` adapt the sites in `ranks` and no other of `modules`, each with its rank there.

    A site's scale stays what it is at the configured rank.
    """
    alphas = {name: config.alpha_at(name, rank) for name, rank in ranks.items()}
    linear = [name for name in ranks if not is_edge(name)]
    config.layers_to_transform = config.layers_pattern = None
    config.target_modules = cast(Any, set(linear))
    config.exclude_modules = cast(Any, set(namesakes(linear, modules))) or None
    config.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    config.alpha_pattern = {f"^{re.escape(name)}": alpha for name, alpha in alphas.items()}
