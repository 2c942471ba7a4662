"""The layers that hold shortcuts: one for each residual edge, a module of its block, named after the kind of edge.

`allocation.shortcuts` has the formulas; no module of the base model changes its name or place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from loraplex.adapters.contracts import BaseWeight, SiteAdapter
from loraplex.errors import UserError
from loraplex.tuner.layer import ADAPTERS, AdapterLayer


class _NoWeight(BaseWeight):
    """A residual edge: there is nothing that the shortcut would change."""

    def matrix(self) -> Tensor:
        """Raise: nothing asks an edge for its weight."""
        raise AssertionError("a residual edge has no weight")

    def bias(self) -> Tensor | None:
        """Return None."""
        return None


class ShortcutLayer(AdapterLayer):
    """The shortcuts of all adapters on one residual edge: x (..., d) ↦ Σ s·P_B P_A x over the active ones."""

    def __init__(self, site: str, width: int, block: nn.Module) -> None:
        super().__init__(site, width, width)
        # past nn.Module, which would register it as a part of this layer
        self.__dict__["_block"] = block

    def reference_parameter(self) -> Tensor:
        """Return a frozen tensor of the block, one of its vectors where it has any: matrices may be quantized."""
        block: nn.Module = self.__dict__["_block"]
        own = [parameter for name, parameter in block.named_parameters() if ADAPTERS not in name]
        return next((parameter for parameter in own if parameter.dim() == 1), own[0])

    @property
    def kind(self) -> str:
        """The kind of edge, which is the layer's name in its block."""
        return self.site.rpartition(".")[2]

    def is_open(self, name: str) -> bool:
        """Whether the adapter of that name has an open rank here."""
        return name in self.loraplex_adapters and self.adapter(name).factors.open_ranks > 0

    @property
    def active(self) -> list[str]:
        """Names of the active adapters that have a shortcut here, open or closed."""
        return (
            [] if self.disable_adapters else [name for name in self.active_adapters if name in self.loraplex_adapters]
        )

    @property
    def acting(self) -> list[str]:
        """Names of the active adapters that have an open rank here."""
        return [name for name in self.active if not self.adapter(name).factors.closed]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """Return what the active shortcuts add, in the type of their factors; None where none acts."""
        if kwargs.get("adapter_names") is not None:
            # `mixed_batches` has refused adapters with shortcuts
            return None
        changes = [self._change(self.adapter(name), x) for name in self.acting]
        return sum(changes[1:], changes[0]) if changes else None

    def _change(self, adapter: SiteAdapter, x: Tensor) -> Tensor:
        # a model that is spread over devices hands x over where the block before it is
        x = x.to(adapter.factors.gate.device)
        return adapter.delta(x, x, _NoWeight())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: the tuner refuses to merge an adapter with an open shortcut."""

    def unmerge(self) -> None:
        """Do nothing."""


def shortcut_layer(block: nn.Module, site: str, width: int) -> ShortcutLayer:
    """Return the block's layer at an edge, made where it has none.

    Raises:
        UserError: when the block has something else of that name.
    """
    kind = site.rpartition(".")[2]
    found = getattr(block, kind, None)
    if isinstance(found, ShortcutLayer):
        return found
    if found is not None:
        raise UserError(f"{site.rpartition('.')[0]} has a '{kind}' of its own: shortcuts cannot take that name")
    layer = ShortcutLayer(site, width, block)
    layer.train(block.training)
    block.add_module(kind, layer)
    return layer


def shortcut_layers(model: nn.Module) -> Iterator[ShortcutLayer]:
    """Yield the layers of all edges of a model."""
    return (module for module in model.modules() if isinstance(module, ShortcutLayer))
