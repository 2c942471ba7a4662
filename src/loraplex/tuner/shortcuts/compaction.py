"""What is written of an adapter with shortcuts once its allocation has finished: closed ranks and edges left out.

Plain LoRA cannot hold a shortcut, so such an adapter stays in our own type. It is written as what has come out: the
uniform allocation, every target and edge by its full name, and ranks and scales of their own where ranks were closed.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

from torch import Tensor

from loraplex.adapters.registry import REGISTRY, Axis, SaveFormat
from loraplex.allocation.sites import is_edge
from loraplex.tuner.options import AdapterOptions
from loraplex.tuner.plans import adapt_exactly

GATE = "factors.gate"
"""Name of the rank gate inside an adapter."""


def is_compacted(config: AdapterOptions) -> bool:
    """Whether closed ranks and edges are left out of what is written in our own type."""
    if config.state.finished_ranks is None or config.state.live or config.allocation.edges is None:
        return False
    # an objective's networks go with all ranks
    return REGISTRY.of_options(config.objective).save_format is not SaveFormat.OWN


def finished_options(config: AdapterOptions) -> AdapterOptions:
    """Return the config to write: `config` itself, or what a finished allocation with shortcuts has made of it."""
    if not is_compacted(config):
        return config
    assert config.state.finished_ranks is not None
    written = copy(config)
    edges = [site for site, rank in config.state.finished_ranks.items() if rank and is_edge(site)]
    if config.adapter.save_format is SaveFormat.OWN:
        # its linear sites keep their closed ranks, and so the gates
        written.allocation = replace(config.allocation, shortcuts=edges or False)  # type: ignore[type-var]
        return written
    linear = _linear(config)
    kept = {site: config.state.finished_ranks[site] or config.rank_of(site) for site in linear}
    kept |= {site: config.state.finished_ranks[site] for site in edges}
    adapt_exactly(written, kept, config.state.other_modules)
    # a file has names in one order
    written.target_modules = sorted(written.target_modules or ())
    written.exclude_modules = sorted(written.exclude_modules or ()) or None
    written.allocation = REGISTRY.default(Axis.ALLOCATION).options(shortcuts=edges)
    return written


def compacted(tensors: dict[str, dict[str, Tensor]], config: AdapterOptions) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of an adapter, site → name → tensor, as `finished_options` describes them."""
    assert config.state.finished_ranks is not None
    written = {}
    whole = config.adapter.save_format is SaveFormat.OWN
    linear = None if whole else _linear(config)
    for site, named in tensors.items():
        if is_edge(site):
            if config.state.finished_ranks[site]:
                written[site] = _open(named)
        elif linear is None:
            written[site] = named
        elif site in linear:
            written[site] = _open(named) if config.state.finished_ranks[site] else named
    return written


def _linear(config: AdapterOptions) -> list[str]:
    """Return the linear sites that are written: those with open ranks, or a closed one where there are no others."""
    assert config.state.finished_ranks is not None
    every = [site for site in config.state.finished_ranks if not is_edge(site)]
    # PEFT makes no adapter without a target
    return [site for site in every if config.state.finished_ranks[site]] or every[:1]


def _open(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a pair without its closed ranks, and without the gate."""
    gate = named[GATE].bool()
    a, b = named["factors.lora_A"], named["factors.lora_B"]
    rest = {name: value for name, value in named.items() if name != GATE}
    return {**rest, "factors.lora_A": a[gate], "factors.lora_B": b[:, gate]}
