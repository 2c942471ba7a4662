"""What an adapter file holds: the one mapping between tensors of the model and tensors of the file.

Two namings. Own: "SITE.loraplex_adapters.factors.lora_A", every tensor, gates too, and "base_model.loraplex_shared.KEY"
for what sites share. LoRA: "SITE.lora_A.weight" and "SITE.lora_magnitude_vector", without gates, for adapters that are
exactly LoRA or DoRA. A loader recognizes the naming by the file itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from loraplex.adapters.registry import SaveFormat, describe_member
from loraplex.allocation.sites import is_edge
from loraplex.errors import UserError
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.layer import ADAPTERS, SiteLayer
from loraplex.tuner.shared import SHARED
from loraplex.tuner.shortcuts.compaction import GATE, compacted, is_compacted

PREFIX = "base_model.model."
"""Before every module's name in the file of an adapter: PEFT's own two layers around the base model."""
ALLOCATION = f"base_model.{SHARED}.allocation"
"""Key of the allocation that has set the gates in a file, as text in bytes."""
_LORA_NAMES = {
    "factors.lora_A": "lora_A.weight",
    "factors.lora_B": "lora_B.weight",
    "combine.lora_magnitude_vector": "lora_magnitude_vector",
}


def of_adapter(state_dict: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Return the entries of a model's state dict that belong to one adapter."""
    return {key: value for key, value in state_dict.items() if any(part in key for part in _containers(adapter_name))}


def _containers(adapter_name: str) -> tuple[str, str]:
    return f".{ADAPTERS}.{adapter_name}.", f".{SHARED}.{adapter_name}."


def _split(key: str, adapter_name: str) -> tuple[str, str, str]:
    """Split a model key into (site with PEFT's prefix, container, tensor name inside the adapter)."""
    for part in _containers(adapter_name):
        site, found, tensor = key.partition(part)
        if found:
            return site, part.split(".")[1], tensor
    raise AssertionError(key)


def _own_key(site: str, container: str, tensor: str) -> str:
    return f"{site}.{container}.{tensor}"


def file_tensors(
    tensors: dict[str, Tensor], config: AdapterConfig, adapter_name: str, model: nn.Module
) -> dict[str, Tensor]:
    """Return what is written: keys without the adapter name, compacted once an allocation has finished."""
    split = {_split(key, adapter_name): value for key, value in tensors.items()}
    if config.save_format is SaveFormat.OWN:
        # transformers' loader would report gates that are not in the file as missing
        every = config.state.live or not config.only_peft_model
        if is_compacted(config):
            split = _compacted_own(split, config)
        written = {
            _own_key(*place): value for place, value in split.items() if every or not _is_open_gate(place[-1], value)
        }
        return {**written, **_recorded_allocation(config)}
    by_site: dict[str, dict[str, Tensor]] = {}
    for (site, _, name), value in split.items():
        if not is_edge(site):
            by_site.setdefault(site, {})[name] = value
    scales = _scales(model, adapter_name) if config.state.finished_ranks is not None else {}
    written = {}
    for site, named in by_site.items():
        if config.state.finished_ranks is not None:
            named = _compacted(named, scales[site.removeprefix(PREFIX)])
        written.update({f"{site}.{_LORA_NAMES[name]}": value for name, value in named.items() if name != GATE})
    return written


def _recorded_allocation(config: AdapterConfig) -> dict[str, Tensor]:
    """Return the allocation under way as a tensor: when a trainer resumes, tensors are all that comes back."""
    if not config.state.live or not config.allocation.moves_ranks:
        return {}
    text = json.dumps(describe_member(config.allocation), sort_keys=True)
    return {ALLOCATION: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def check_allocation(recorded: Tensor | None, config: AdapterConfig, adapter_name: str) -> None:
    """Check that the gates of a file are those of the allocation that the adapter has.

    Raises:
        UserError: when another one has set them.
    """
    if recorded is None:
        return
    before = json.loads(bytes(recorded.tolist()))
    now = json.loads(json.dumps(describe_member(config.allocation)))
    if before != now:
        raise UserError(
            f"the checkpoint was trained with the allocation {before!r}, adapter '{adapter_name}' has {now!r}: resume "
            "with the former, or start anew"
        )


def _compacted_own(
    split: dict[tuple[str, str, str], Tensor], config: AdapterConfig
) -> dict[tuple[str, str, str], Tensor]:
    """Return what is written in our own type: the sites without their closed ranks, shared tensors as they are."""
    sites: dict[str, dict[str, Tensor]] = {}
    for (site, container, name), value in split.items():
        if container == ADAPTERS:
            sites.setdefault(site.removeprefix(PREFIX), {})[name] = value
    kept = {place: value for place, value in split.items() if place[1] != ADAPTERS}
    for site, named in compacted(sites, config).items():
        kept.update({(PREFIX + site, ADAPTERS, name): value for name, value in named.items()})
    return kept


def peft_tensors(layers: Iterable[SiteLayer], adapter_name: str) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Return the rank of every site, and the pairs in LoRA's naming: closed ranks left out, the scale in B."""
    ranks, tensors = {}, {}
    for layer in layers:
        if adapter_name not in layer.loraplex_adapters:
            continue
        adapter = layer.adapter(adapter_name)
        a, b = adapter.factors.compact()
        ranks[layer.site] = len(a)
        if len(a):
            combine = {f"combine.{name}": value.detach() for name, value in adapter.combine.state_dict().items()}
            named = {"factors.lora_A": a, "factors.lora_B": b, **combine}
            tensors.update({f"{PREFIX}{layer.site}.{_LORA_NAMES[name]}": value for name, value in named.items()})
    return ranks, tensors


def _is_open_gate(name: str, value: Tensor) -> bool:
    return name == GATE and bool(value.all())


def _compacted(named: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Drop closed ranks and fold the scale into B; a site without open ranks is left out."""
    gate = named[GATE].bool()
    if not gate.any():
        return {}
    rest = {name: value for name, value in named.items() if name != GATE}
    a, b = rest["factors.lora_A"], rest["factors.lora_B"]
    return {**rest, "factors.lora_A": a[gate], "factors.lora_B": b[:, gate] * scale}


def _scales(model: nn.Module, adapter_name: str) -> dict[str, float]:
    return {
        layer.site: layer.adapter(adapter_name).factors.scale
        for layer in model.modules()
        if isinstance(layer, SiteLayer) and adapter_name in layer.loraplex_adapters
    }


def model_tensors(
    model: nn.Module, adapter_name: str, tensors: dict[str, Tensor], biases: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Return a file's tensors under the model's keys, every key checked both ways.

    Gates that the file does not hold are opened: they may have been closed since. `biases` are the model's keys of
    the biases that the file must hold too.

    Raises:
        UserError: for a tensor that is missing, not expected, or of another shape than the model's.
    """
    ours = model.state_dict()
    adapter = of_adapter(ours, adapter_name)
    lora_naming = not any(f".{container}." in key for key in tensors for container in (ADAPTERS, SHARED))
    translated: dict[str, str] = {}
    for key in adapter:
        site, container, name = _split(key, adapter_name)
        if lora_naming and name == GATE:
            continue
        own = _own_key(site, container, name)
        file_key = f"{site}.{_LORA_NAMES.get(name, name)}" if lora_naming else own
        translated[file_key] = key
        if not file_key.startswith(PREFIX):
            # layers injected without a PeftModel: the file has PEFT's prefix, the model has not
            translated[PREFIX + file_key] = key
    loaded: dict[str, Tensor] = {}
    for key, value in tensors.items():
        # stock PEFT writes the biases of modules_to_save a second time (bias='all')
        name = translated.get(key, key.replace(".modules_to_save.bias", f".modules_to_save.{adapter_name}.bias"))
        if name not in ours and name.removeprefix(PREFIX) not in ours:
            raise UserError(f"the adapter file holds '{key}', which this model and config do not have")
        loaded[name] = value
    for key, value in adapter.items():
        if key not in loaded and key.endswith(f".{GATE}"):
            loaded[key] = torch.ones_like(value)
    expected = {**adapter, **{key: ours[key] for key in biases if f".modules_to_save.{adapter_name}." not in key}}
    _check_complete(expected, loaded, ours)
    _check_frozen(model, adapter_name, loaded)
    return loaded


def _check_complete(expected: dict[str, Tensor], loaded: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    missing = [key for key in expected if key not in loaded and PREFIX + key not in loaded]
    if missing:
        raise UserError(
            f"the adapter file lacks {len(missing)} of {len(expected)} tensors, the first is '{missing[0]}'"
        )
    for key, value in loaded.items():
        own = ours[key if key in ours else key.removeprefix(PREFIX)]
        if value.shape != own.shape:
            raise UserError(
                f"'{key}' is {tuple(value.shape)} in the file and {tuple(own.shape)} in the model: "
                "the adapter belongs to another base model or configuration"
            )


def _check_frozen(model: nn.Module, adapter_name: str, loaded: dict[str, Tensor]) -> None:
    """Let the factors of every site compare what is loaded with the frozen tensors that the file does not hold."""
    for name, layer in model.named_modules():
        if isinstance(layer, SiteLayer) and adapter_name in layer.loraplex_adapters:
            prefix = f"{name}.{ADAPTERS}.{adapter_name}.factors."
            tensors = {key.removeprefix(prefix): value for key, value in loaded.items() if key.startswith(prefix)}
            layer.adapter(adapter_name).factors.check_file(layer.site, tensors)


def gates_are_open(tensors: dict[str, Tensor]) -> bool:
    """Whether every rank gate among a model's tensors is open."""
    return all(bool(value.all()) for key, value in tensors.items() if key.endswith(f".{GATE}"))
