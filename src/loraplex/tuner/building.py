"""Adapters made for the places of a model, as a config asks for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from loraplex.adapters.contracts import SiteAdapter, SiteInit, check_rank
from loraplex.allocation.shortcuts import build_shortcut
from loraplex.models.blocks import find_blocks
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.layer import SiteLayer
from loraplex.tuner.matching import find_edges
from loraplex.tuner.shortcuts import ShortcutLayer, open_streams, shortcut_layer


def build_adapter(layer: SiteLayer, site: str, config: AdapterConfig, shared: Any) -> SiteAdapter:
    """Return a freshly initialized adapter for a layer; `shared` gives what its sites have in common."""
    options = config.typed_adapter
    assert config.seed is not None
    limit = options.factors.largest_rank(layer.in_features, layer.out_features)
    rank = check_rank(site, config.rank_of(site), limit)
    # room for ranks that are opened later; the scale stays that of the configured rank
    built = min(config.typed_allocation.allocated_rank(rank), limit)
    scale = options.factors.scale
    init = SiteInit(
        name=site,
        in_features=layer.in_features,
        out_features=layer.out_features,
        rank=built,
        alpha=config.alpha_of(site) * scale(1, rank) / scale(1, built),
        seed=config.seed,
        weight=layer.w0,
        identity=config.init_weights,
        meta=_makes_meta_parameters(),
        shared=shared,
    )
    factors = options.factors.build(init)
    return SiteAdapter(factors, options.combine.build(replace(init, heads=factors.heads)), config.lora_dropout)


def add_shortcuts(model: nn.Module, config: AdapterConfig, adapter_name: str) -> list[ShortcutLayer]:
    """Build the shortcuts of an adapter that sits on a model's linear maps, and return their layers.

    Raises:
        UserError: when the model's residual stream is not found, or one of its blocks has a module of that name.
    """
    layers = [module for module in model.modules() if isinstance(module, SiteLayer)]
    names = [layer.site for layer in layers if adapter_name in layer.loraplex_adapters]
    edges = find_edges(model, config, names)
    if not edges:
        return []
    open_streams(model, find_blocks(model, names).modules)
    added = []
    for edge in edges:
        layer = shortcut_layer(model.get_submodule(edge.name.rpartition(".")[0]), edge.name, edge.in_features)
        layer.loraplex_adapters[adapter_name] = _built(layer, config)
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        added.append(layer)
    return added


def _built(layer: ShortcutLayer, config: AdapterConfig) -> SiteAdapter:
    assert config.seed is not None
    return build_shortcut(
        SiteInit(
            name=layer.site,
            in_features=layer.in_features,
            out_features=layer.out_features,
            rank=check_rank(layer.site, config.rank_of(layer.site), layer.in_features),
            alpha=config.alpha_of(layer.site),
            seed=config.seed,
            weight=layer.neighbor,
            identity=config.init_weights,
            meta=_makes_meta_parameters(),
        )
    )


def _makes_meta_parameters() -> bool:
    """Whether parameters are being put on the meta device right now (low_cpu_mem_usage)."""
    probe = nn.Module()
    probe.probe = nn.Parameter(torch.empty(0))
    return bool(probe.probe.is_meta)
