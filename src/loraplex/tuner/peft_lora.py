"""Translation between our config and PEFT's LoraConfig, both ways; what has no counterpart is refused."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from peft import LoraConfig

from loraplex.adapters.registry import REGISTRY, Adapter, Axis, SaveFormat
from loraplex.errors import UserError
from loraplex.tuner.options import AdapterOptions
from loraplex.tuner.sites import namesakes

_SAME = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "bias",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
)
"""Fields with the same name and meaning on both sides."""

_HARMLESS = {
    *("peft_type", "peft_version", "lora_alpha", "init_lora_weights", "runtime_config", "megatron_core", "use_dora"),
    *("fan_in_fan_out", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
"""LoraConfig fields that do not change what a finished adapter computes, or that are translated by hand."""

_PLAIN_INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the frozen weights alone; under the others A and B belong to changed ones."""


def to_lora_config(config: AdapterOptions) -> LoraConfig:
    """Return the LoraConfig under which the file we write computes the same function."""
    adapter = config.adapter
    assert adapter.peft_format is not SaveFormat.OWN
    values: dict[str, Any] = {name: getattr(config, name) for name in _SAME}
    for options in (adapter.factors, adapter.combine):
        values.update({name: getattr(options, name) for name in _shared_options(type(options))})
    values.update(
        lora_alpha=config.lora_alpha,
        use_dora=adapter.peft_format is SaveFormat.DORA,
        fan_in_fan_out=config.state.transposed,
    )
    if config.state.finished_ranks is not None:
        ranks = {site: rank for site, rank in config.state.finished_ranks.items() if rank > 0}
        exact = {f"^{re.escape(site)}": rank for site, rank in ranks.items()}
        # the scale has been folded into B: alpha = r everywhere
        values.update(
            target_modules=sorted(ranks),
            exclude_modules=namesakes(ranks, config.state.other_modules) or None,
            layers_to_transform=None,
            layers_pattern=None,
            rank_pattern=exact,
            alpha_pattern=dict(exact),
            r=max(ranks.values()),
            lora_alpha=max(ranks.values()),
            use_rslora=False,
        )
    return LoraConfig(**values)


def options_of_lora(lora: LoraConfig) -> dict[str, Any]:
    """Return the fields of the `AdapterConfig` that reproduces a LoraConfig.

    Raises:
        UserError: names the first field that has no counterpart here.
    """
    form = SaveFormat.DORA if lora.use_dora else SaveFormat.LORA
    factors = next(m.options for m in REGISTRY.members(Axis.FACTORS) if m.save_format is SaveFormat.LORA)
    combine = next(m.options for m in REGISTRY.members(Axis.COMBINE) if m.save_format is form)
    parts = [cls(**{name: getattr(lora, name) for name in _shared_options(cls)}) for cls in (factors, combine)]
    _refuse_other_fields(lora, {name for cls in (factors, combine) for name in _shared_options(cls)})
    values: dict[str, Any] = {name: getattr(lora, name) for name in _SAME}
    for name in ("target_modules", "exclude_modules"):
        if isinstance(values[name], set):
            values[name] = sorted(values[name])
    return {"adapter": Adapter(*parts), "lora_alpha": lora.lora_alpha, **values}


def _shared_options(options: type) -> list[str]:
    """Names of a method's options that are LoraConfig fields too (use_rslora)."""
    theirs = {entry.name for entry in fields(LoraConfig)}
    return [entry.name for entry in fields(options) if entry.name in theirs]


def _refuse_other_fields(lora: LoraConfig, understood: set[str]) -> None:
    if lora.init_lora_weights not in _PLAIN_INITIALIZATIONS:
        _refuse("init_lora_weights", lora.init_lora_weights)
    for entry in fields(LoraConfig):
        if entry.name in _SAME or entry.name in _HARMLESS or entry.name in understood:
            continue
        default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
        value = getattr(lora, entry.name)
        if value != default and bool(value) != bool(default):
            _refuse(entry.name, value)


def _refuse(name: str, value: Any) -> NoReturn:
    raise UserError(f"this LoRA adapter uses {name}={value!r}, which loraplex does not represent: load it with peft")
