"""Adapters made for the linear maps of a model, as a config asks for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from loraplex.adapters.contracts import SiteAdapter, SiteInit, check_rank
from loraplex.tuner.layer import SiteLayer
from loraplex.tuner.options import AdapterOptions


def build_adapter(layer: SiteLayer, site: str, config: AdapterOptions, shared: Any) -> SiteAdapter:
    """Return a freshly initialized adapter for a layer; `shared` gives what its sites have in common."""
    options = config.adapter
    assert config.seed is not None
    limit = options.factors.largest_rank(layer.in_features, layer.out_features)
    rank = check_rank(site, config.rank_of(site), limit)
    # room for ranks that are opened later; the scale stays that of the configured rank
    built = min(config.allocation.allocated_rank(rank), limit)
    scale = options.factors.scale
    init = SiteInit(
        name=site,
        in_features=layer.in_features,
        out_features=layer.out_features,
        rank=built,
        alpha=config.alpha_of(site) * scale(1, rank) / scale(1, built),
        seed=config.seed,
        weight=layer.w0,
        identity=config.init_lora_weights,
        meta=makes_meta_parameters(),
        shared=shared,
    )
    factors = options.factors.build(init)
    return SiteAdapter(factors, options.combine.build(replace(init, heads=factors.heads)), config.lora_dropout)


def makes_meta_parameters() -> bool:
    """Whether parameters are being put on the meta device right now (low_cpu_mem_usage)."""
    probe = nn.Module()
    probe.probe = nn.Parameter(torch.empty(0))
    return bool(probe.probe.is_meta)
