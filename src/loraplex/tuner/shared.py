"""The owner of tensors that several sites of an adapter use: a container of the tuner, adapter name → key → module.

The sites refer to the modules without registering them, so every tensor is counted, saved and sharded once. PEFT's own
functions look for adapters inside the base model only; what they do to the sites is done here for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import nn

from loraplex.tuner.layer import cast

SHARED = "loraplex_shared"
"""Attribute of the tuner; part of the keys of shared tensors."""


class SharedTensors(nn.ModuleDict):
    """Adapter name → key → module."""

    def getter(self, adapter_name: str) -> Callable[[str, Callable[[], nn.Module]], nn.Module]:
        """Return the function that gives the adapter's module of a key, made on first use."""

        def get(key: str, make: Callable[[], nn.Module]) -> nn.Module:
            if adapter_name not in self:
                self[adapter_name] = nn.ModuleDict()
            modules = self._modules_of(adapter_name)
            if key not in modules:
                modules[key] = make()
            return modules[key]

        return get

    def drop(self, adapter_name: str) -> None:
        """Forget the adapter's tensors, if it has any."""
        if adapter_name in self:
            del self[adapter_name]

    def drop_key(self, adapter_name: str, key: str) -> None:
        """Forget one of the adapter's modules, and the adapter where it has no other."""
        modules = self._modules_of(adapter_name)
        del modules[key]
        if not modules:
            del self[adapter_name]

    def requires_grad(self, adapter_names: Collection[str], wanted: bool) -> None:
        """Switch the gradients of these adapters on or off."""
        for name in adapter_names:
            if name in self:
                self[name].requires_grad_(wanted)

    def activate(self, adapter_names: Collection[str], inference_mode: bool) -> None:
        """Let the tensors of these adapters train, unless in inference mode, and no others."""
        for name in self:
            self[name].requires_grad_(name in adapter_names and not inference_mode)

    def cast(self, adapter_name: str, base: torch.dtype, autocast: bool) -> None:
        """Cast the adapter's tensors as `SiteLayer.cast_adapter` does."""
        if adapter_name in self:
            cast(self[adapter_name], base, autocast)

    def key_parts(self) -> Iterator[str]:
        """Yield the components of the tensors' names, which no adapter may be called."""
        for modules in self.values():
            for key in modules.state_dict():
                yield from key.split(".")

    def _modules_of(self, adapter_name: str) -> nn.ModuleDict:
        modules = self[adapter_name]
        assert isinstance(modules, nn.ModuleDict)
        return modules
