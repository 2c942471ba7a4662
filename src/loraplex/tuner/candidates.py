"""What an allocation chooses among: the places of a model that carry an adapter, as `allocation.contracts` has them."""

from __future__ import annotations

from loraplex.allocation.contracts import Candidate
from loraplex.allocation.sites import Site
from loraplex.tuner.layer import AdapterLayer, SiteLayer
from loraplex.tuner.model import LoraplexTuner


def candidates_of(tuner: LoraplexTuner, adapter_name: str) -> list[Candidate]:
    """Return what an allocation of the adapter chooses among: its linear sites, then its shortcuts."""
    return [_candidate(layer, adapter_name) for layer in tuner.adapter_layers(adapter_name)]


def _candidate(layer: AdapterLayer, adapter_name: str) -> Candidate:
    frozen = layer.frozen if isinstance(layer, SiteLayer) else None
    bias = frozen is not None and frozen.bias() is not None
    site = Site(layer.site, layer.in_features, layer.out_features, bias)
    return Candidate(site, layer, layer.adapter(adapter_name), frozen.parameter if frozen is not None else None)
