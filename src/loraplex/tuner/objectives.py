"""Objectives under the tuner: built with their adapter, detached when they end.

An objective is a module of `loraplex_shared`, so it is saved, cast, switched and deleted as shared tensors are. How far
training is, `training_hooks.objective` tells it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import nn

from loraplex.adapters.contracts import SiteAdapter
from loraplex.adapters.registry import REGISTRY, Axis
from loraplex.errors import UserError
from loraplex.objectives.contracts import Objective, ObjectiveInit
from loraplex.tuner.layer import SiteLayer
from loraplex.tuner.options import AdapterOptions
from loraplex.tuner.shared import SharedTensors

KEY = "objective"
"""The key of the objective among an adapter's shared modules."""


class Host(Protocol):
    """A tuner, as far as objectives need to know it."""

    model: nn.Module
    peft_config: dict[str, Any]
    loraplex_shared: SharedTensors

    @property
    def active_adapters(self) -> Sequence[str]:
        """The names of the adapters that are switched on."""

    def site_layers(self) -> Iterator[SiteLayer]:
        """Yield the linear maps that carry adapters."""


def build(tuner: Host, adapter_name: str) -> None:
    """Build and attach the objective of an adapter that has just been injected, if it has one."""
    config, sites = tuner.peft_config[adapter_name], sites_of(tuner, adapter_name)
    assert isinstance(config, AdapterOptions)
    widths = {layer.site: layer.out_features for layer in tuner.site_layers()}
    assert config.seed is not None
    objective = config.objective.build(ObjectiveInit(tuner.model, sites, widths, config.seed, config.init_lora_weights))
    if objective is None:
        return
    assert isinstance(objective, Objective)
    device = next(tuner.site_layers()).frozen.parameter().device
    if device.type != "meta" and not any(parameter.is_meta for parameter in objective.parameters()):
        objective.to(device)
    tuner.loraplex_shared.getter(adapter_name)(KEY, lambda: objective)
    objective.requires_grad_(adapter_name in tuner.active_adapters and not config.inference_mode)
    objective.attach(tuner.model, sites)


def attached(shared: SharedTensors) -> dict[str, Objective]:
    """Return the objectives among the shared modules, by adapter."""
    found = {name: getattr(modules, KEY, None) for name, modules in shared.items()}
    return {name: objective for name, objective in found.items() if isinstance(objective, Objective)}


def acting(tuner: Host) -> Objective | None:
    """Return the objective that a training forward has to minimize, None where there is none.

    Raises:
        UserError: when adapters are active beside the one with the objective, or it is switched off.
    """
    objectives = attached(tuner.loraplex_shared)
    active = list(tuner.active_adapters)
    chosen = [name for name in active if name in objectives]
    if not chosen:
        return None
    if len(active) > 1 or any(layer.disable_adapters or layer.merged for layer in tuner.site_layers()):
        raise UserError(
            f"the objective '{name_of(tuner, chosen[0])}' of adapter '{chosen[0]}' trains one adapter that is switched "
            f"on and not merged, active are {', '.join(active)}: activate it alone, or end it with detach_objective"
        )
    return objectives[chosen[0]]


def name_of(tuner: Host, adapter_name: str) -> str:
    """Return the name of an adapter's objective."""
    config = tuner.peft_config[adapter_name]
    assert isinstance(config, AdapterOptions)
    return REGISTRY.of_options(config.objective).name


def detach(tuner: Host, adapter_name: str) -> None:
    """Let the objective of an adapter go, if it has one, and forget its tensors."""
    objective = attached(tuner.loraplex_shared).get(adapter_name)
    if objective is None:
        return
    objective.detach(tuner.model)
    tuner.loraplex_shared.drop_key(adapter_name, KEY)
    config = tuner.peft_config[adapter_name]
    assert isinstance(config, AdapterOptions)
    config.objective = REGISTRY.default(Axis.OBJECTIVE).options()


def sites_of(tuner: Host, adapter_name: str) -> dict[str, SiteAdapter]:
    """Return an adapter's parts on the linear sites, by their full names."""
    return {
        layer.site: layer.adapter(adapter_name)
        for layer in tuner.site_layers()
        if adapter_name in layer.loraplex_adapters
    }
