"""Which modules of a model a config adapts: the one list of sites that planning, injection and reports share."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from copy import copy
from typing import Any

from peft import TaskType
from torch import nn
from transformers import PreTrainedModel

from loraplex.adapters.contracts import check_rank
from loraplex.allocation.edges import edges_of
from loraplex.allocation.sites import Site
from loraplex.compat.peft import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SEQ_CLS_HEAD_NAMES,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    is_target,
)
from loraplex.errors import UserError, nearest
from loraplex.models.blocks import find_blocks
from loraplex.tuner.layer import features
from loraplex.tuner.options import AdapterOptions
from loraplex.tuner.shortcuts.layers import ShortcutLayer

_TASKS_WITH_HEADS = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


def find_sites(model: nn.Module, config: AdapterOptions) -> list[Site]:
    """Return the sites that `config` adapts in `model`, in the order of its modules, residual edges last.

    The model may carry adapters already; the config is not changed.

    Raises:
        UserError: when a name, pattern or layer index matches nothing (the nearest names are given), when a target is
            not a linear map, or when a rank is larger than its site allows.
    """
    config = copy(config)
    config.target_modules = resolved_targets(model, config)
    sites, refused = [], []
    for name, module in _own_modules(model):
        if not name or not _matches(config, name):
            continue
        frozen = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        shape = features(frozen)
        if shape is None:
            refused.append((name, type(frozen).__name__))
            continue
        sites.append(Site(name, *shape, bias=getattr(frozen, "bias", None) is not None))
    _check_targets(model, config, sites, refused)
    edges = find_edges(model, config, [site.name for site in sites])
    _check_patterns(config, sites + edges)
    _check_other_names(model, config)
    for site in sites:
        limit = config.adapter.factors.largest_rank(site.in_features, site.out_features)
        check_rank(site.name, config.rank_of(site.name), limit)
    for edge in edges:
        check_rank(edge.name, config.rank_of(edge.name), edge.in_features)
    return sites + edges


def find_edges(model: nn.Module, config: AdapterOptions, linear: Iterable[str]) -> list[Site]:
    """Return the residual edges that `config` has shortcuts on, in the blocks that hold the sites `linear`.

    Raises:
        UserError: when these lie in no blocks, or a name of an edge matches none.
    """
    wanted = config.allocation.edges
    if wanted is None:
        return []
    blocks = find_blocks(model, linear)
    chosen = wanted.among(edges_of(blocks.path, len(blocks.modules), blocks.width))
    indices = config.layers_to_transform
    kept = [indices] if isinstance(indices, int) else indices
    prefixes = None if not kept else tuple(f"{blocks.path}.{index}." for index in kept)
    return [edge for edge in chosen if prefixes is None or edge.name.startswith(prefixes)]


def resolved_targets(model: nn.Module, config: AdapterOptions) -> Any:
    """Return target_modules filled in: the architecture's default where absent, the names behind 'all-linear'.

    PEFT's own reading of 'all-linear' overlooks modules that carry our adapters already.
    """
    targets = config.target_modules
    if targets is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        names = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(str(model_type))
        if names is None:
            raise UserError(
                f"no default target_modules for model type '{model_type}'. Please specify `target_modules`, "
                "for example 'all-linear'"
            )
        return set(names)
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        head = _head(model, config)
        return {
            name for name, module in _own_modules(model) if module is not head and features(_frozen(module)) is not None
        }
    return targets


def without_absent_names(model: nn.Module, config: AdapterOptions) -> AdapterOptions:
    """Return a copy of `config` without names and patterns that match nothing in `model`.

    For adapters that come from elsewhere: their lists often name the modules of several architectures, and what is
    really adapted is checked by the tensors of the file. Targets that all match nothing stay, to be reported.
    """
    config = copy(config)
    names = module_names(model)
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        listed = getattr(config, field)
        if isinstance(listed, (set, list)):
            found = type(listed)(name for name in listed if _is_listed(names, name))
            setattr(config, field, found or (listed if field == "target_modules" else None))
    if config.target_modules is not None and config.target_modules != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        names = [name for name in names if name and _matches(config, name)]
    if config.allocation.edges is not None:
        names = [*names, *(edge.name for edge in find_edges(model, config, names))]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field).items()
        setattr(config, field, {p: value for p, value in patterns if any(_pattern_matches(p, n) for n in names)})
    return config


def _is_listed(names: Iterable[str], suffix: str) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for name in names)


def _pattern_matches(pattern: str, name: str) -> bool:
    # as PEFT reads the keys of rank_pattern and alpha_pattern
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _head(model: nn.Module, config: AdapterOptions) -> nn.Module | None:
    """Return what 'all-linear' leaves out, as in PEFT: the output embedding, or a classification head."""
    if not isinstance(model, PreTrainedModel):
        return None
    head: nn.Module | None = model.get_output_embeddings()
    if head is None and config.task_type == TaskType.SEQ_CLS:
        heads = (getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES)
        head = next((module for module in heads if module is not None), None)
    return head


def module_names(model: nn.Module) -> list[str]:
    """Return the names of the base model's own modules."""
    return [name for name, _ in _own_modules(model)]


def namesakes(sites: Collection[str], others: Iterable[str]) -> list[str]:
    """Return the modules that PEFT would take for one of the `sites`: it matches names as suffixes."""
    endings = tuple(f".{site}" for site in sites)
    return sorted(name for name in others if name not in sites and name.endswith(endings))


def _own_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Yield the base model's modules under their own names, without what PEFT has put inside them."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if (name.startswith(inside) and inside) or isinstance(module, ShortcutLayer):
            continue
        yield name, module
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside = (*inside, name + ".")


def _matches(config: AdapterOptions, name: str) -> bool:
    return is_target(config, name)


def _check_targets(model: nn.Module, config: AdapterOptions, sites: list[Site], refused: list[tuple[str, str]]) -> None:
    if refused:
        name, kind = refused[0]
        raise UserError(f"target {name} is a {kind}: loraplex adapts Linear and Conv1D modules only")
    linear = [name for name, module in _own_modules(model) if features(_frozen(module)) is not None]
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linear))
    if isinstance(config.target_modules, (set, list, tuple)):
        names = module_names(model)
        for target in sorted(config.target_modules):
            if not _is_listed(names, target):
                raise UserError(
                    f"Target modules: '{target}' not found in the base model; its linear modules are "
                    f"{', '.join(kinds)}.{nearest(target, kinds + linear)}"
                )
    if not sites:
        raise UserError(
            f"target_modules {config.target_modules!r} with the given exclusions and layers match no linear module; "
            f"the linear modules are {', '.join(kinds)}.{nearest(str(config.target_modules), kinds + linear)}"
        )


def _frozen(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _check_patterns(config: AdapterOptions, sites: list[Site]) -> None:
    for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(_pattern_matches(pattern, site.name) for site in sites):
                hint = nearest(pattern, [site.kind for site in sites] + [site.name for site in sites])
                raise UserError(f"{field} '{pattern}' matches no adapted module.{hint}")


def _check_other_names(model: nn.Module, config: AdapterOptions) -> None:
    names = module_names(model)
    # PEFT adds the usual names of heads to every config of these tasks
    usual = {*SEQ_CLS_HEAD_NAMES, "qa_outputs"} if config.task_type in _TASKS_WITH_HEADS else set()
    for field in ("exclude_modules", "modules_to_save"):
        listed = getattr(config, field)
        for name in sorted(listed) if isinstance(listed, (set, list)) else ():
            if name not in usual and not _is_listed(names, name):
                hint = nearest(name, {part for full in names for part in (full, full.rsplit(".", 1)[-1])})
                raise UserError(f"{field} '{name}' matches no module.{hint}")
    indices = config.layers_to_transform
    for index in [indices] if isinstance(indices, int) else indices or ():
        single = copy(config)
        single.layers_to_transform = index
        if not any(_matches(single, name) for name in names if name):
            raise UserError(f"layers_to_transform {index} matches no adapted module: the model has fewer layers")
