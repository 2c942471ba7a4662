"""Shortcuts made for the residual edges of a model, as a config asks for them."""

from __future__ import annotations

from torch import nn

from loraplex.adapters.contracts import SiteAdapter, SiteInit, check_rank
from loraplex.allocation.shortcuts import build_shortcut
from loraplex.models.blocks import find_blocks
from loraplex.tuner.building import makes_meta_parameters
from loraplex.tuner.layer import SiteLayer
from loraplex.tuner.options import AdapterOptions
from loraplex.tuner.shortcuts.layers import ShortcutLayer, shortcut_layer
from loraplex.tuner.shortcuts.stream import open_streams
from loraplex.tuner.sites import find_edges


def add_shortcuts(model: nn.Module, config: AdapterOptions, adapter_name: str) -> list[ShortcutLayer]:
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


def _built(layer: ShortcutLayer, config: AdapterOptions) -> SiteAdapter:
    assert config.seed is not None
    return build_shortcut(
        SiteInit(
            name=layer.site,
            in_features=layer.in_features,
            out_features=layer.out_features,
            rank=check_rank(layer.site, config.rank_of(layer.site), layer.in_features),
            alpha=config.alpha_of(layer.site),
            seed=config.seed,
            weight=layer.reference_parameter,
            identity=config.init_lora_weights,
            meta=makes_meta_parameters(),
        )
    )
