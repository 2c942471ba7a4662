"""The layers that hold adapters: what they have in common, and a frozen linear map with those that sit on it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from typing import cast as typed

import torch
from torch import Tensor, nn

from loraplex.adapters.contracts import BaseWeight, SiteAdapter
from loraplex.compat.accelerate import is_dispatched
from loraplex.compat.peft import BaseTunerLayer, check_adapters_to_merge, dequantize_module_weight
from loraplex.compat.torch import NonDynamicallyQuantizableLinear, number_of_hooks
from loraplex.compat.transformers import Conv1D
from loraplex.errors import UserError

ADAPTERS = "loraplex_adapters"
"""Attribute of the layer that holds its adapters by name; part of every parameter key of ours."""


class FrozenLinear(BaseWeight):
    """W0 and b of an `nn.Linear` or a GPT-2 `Conv1D` (which stores the transpose)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.transposed = isinstance(module, Conv1D)

    def is_dense(self) -> bool:
        """Whether calling the module is nothing but x W0ᵀ + b on a weight that is here: no hooks, shards or codes."""
        module = self.module
        return (
            type(module) in (nn.Linear, Conv1D)
            and type(module.weight) is nn.Parameter
            and not module.weight.requires_grad
            and module.weight.dtype in (torch.bfloat16, torch.float32, torch.float64)
            and not number_of_hooks(module)
            and not is_dispatched(module)
        )

    def matrix(self) -> Tensor:
        """Return W0 (out, in), dequantized where necessary."""
        weight = self.parameter() if self.is_dense() else dequantize_module_weight(self.module)
        return weight.T if self.transposed else weight

    def bias(self) -> Tensor | None:
        """Return b (out,) or None."""
        return typed("Tensor | None", self.module.bias)

    def parameter(self) -> nn.Parameter:
        """Return the weight as the module stores it."""
        return typed(nn.Parameter, self.module.weight)


def features(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a linear map that can be a site, None for any other module."""
    # torch's MultiheadAttention reads the weight of its out_proj without calling it
    if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def cast(module: nn.Module, base: torch.dtype, autocast: bool) -> None:
    """Cast an adapter's parameters under a frozen weight of type `base`: to float32 at least when `autocast`.

    Frozen tensors are never rounded.
    """
    dtype = base if base.is_floating_point and base.itemsize >= 2 else torch.float32
    if autocast:
        dtype = torch.promote_types(dtype, torch.float32)
    for parameter in module.parameters():
        # in place: optimizers and checkpoints may already hold the parameter
        parameter.data = parameter.data.to(dtype)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(torch.promote_types(buffer.dtype, dtype))


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A place in a model, with the adapters of all names that sit there."""

    adapter_layer_names = (ADAPTERS,)
    other_param_names = ()

    def __init__(self, site: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.site = site
        self.in_features, self.out_features = in_features, out_features
        self.loraplex_adapters = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def switch(self, *, off: bool) -> None:
        """Let no adapter act here, or let them act again; who trains is not touched."""
        self._disable_adapters = off

    def reference_parameter(self) -> Tensor:
        """Return a frozen tensor of the base model: where it is and of which type, adapters follow."""
        raise NotImplementedError

    def adapter(self, name: str) -> SiteAdapter:
        """Return the adapter of that name in this place."""
        module = self.loraplex_adapters[name]
        assert isinstance(module, SiteAdapter)
        return module

    def cast_adapter(self, name: str, autocast: bool) -> None:
        """Cast an adapter's parameters: at least float32 when `autocast`, the dtype of the base otherwise."""
        if name in self.loraplex_adapters:
            cast(self.loraplex_adapters[name], self.reference_parameter().dtype, autocast)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own also casts to the dtype of the base, which rounds float32 adapters
        target = self.reference_parameter().device if device is None else device
        if adapter_name in self.loraplex_adapters and target.type != "meta":
            module = self.loraplex_adapters[adapter_name]
            if not any(tensor.is_meta for tensor in module.state_dict().values()):
                module.to(target)
                for shared in self.adapter(adapter_name).factors.borrowed():
                    if not any(tensor.is_meta for tensor in shared.state_dict().values()):
                        shared.to(target)


class SiteLayer(AdapterLayer):
    """Frozen linear plus adapters: y = base(x) + Σ Δy over the active adapters, each Δ taken against W0."""

    def __init__(self, base_layer: nn.Module, site: str) -> None:
        shape = features(base_layer)
        assert shape is not None
        super().__init__(site, *shape)
        self.base_layer = base_layer
        # W0 while adapters are merged, so that unmerging is exact to the bit
        self._kept_weight: Tensor | None = None

    @property
    def frozen(self) -> FrozenLinear:
        """The frozen linear map as it is now: quantizing or sharding may put another module in its place."""
        return FrozenLinear(self.base_layer)

    def reference_parameter(self) -> Tensor:
        """Return the frozen weight as it is stored."""
        return self.frozen.parameter()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return y (..., out) for x (..., in); `adapter_names` gives each row of the batch its own adapter."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        off = self.disable_adapters or self.merged
        active = [] if off else [name for name in self.active_adapters if name in self.loraplex_adapters]
        if len(active) == 1 and not args and not kwargs and self.frozen.is_dense():
            return self.adapter(active[0]).output(x, self.frozen.matrix(), self.frozen.bias())
        y0: Tensor = self.base_layer(x, *args, **kwargs)
        deltas = [self.adapter(name).delta(x, y0, self.frozen) for name in active]
        return (y0 + sum(deltas[1:], deltas[0])).to(y0.dtype) if deltas else y0

    def _mixed_batch(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            raise UserError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(x) != len(names):
            raise UserError(
                "Length of `adapter_names` should be the same as the number of inputs, "
                f"but got {len(names)} and {len(x)} respectively."
            )
        y0: Tensor = self.base_layer(x, *args, **kwargs)
        y = y0.clone()
        for name in dict.fromkeys(names):
            if self.disable_adapters or name not in self.loraplex_adapters:
                continue
            index = torch.tensor([i for i, row in enumerate(names) if row == name], device=x.device)
            delta = self.adapter(name).delta(x[index], y0[index], self.frozen)
            y[index] = (y0[index] + delta).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the active (or the named) adapters into the base weight: W0 + Σ ΔW, every ΔW taken against W0.

        Raises:
            UserError: with `safe_merge`, when the result is not finite; the base weight is then untouched.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.loraplex_adapters]
        if not names:
            return
        if safe_merge:
            self.check_merge(names)
        weight = self.frozen.parameter()
        merged = self._merged_weight(names)
        self._kept_weight = self._stored_w0()
        weight.data = merged
        self.merged_adapters.extend(names)

    def check_merge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise a UserError when merging the active (or the named) adapters would give NaN or infinity."""
        chosen = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in chosen if n in self.loraplex_adapters and n not in self.merged_adapters]
        if names and not torch.isfinite(self._merged_weight(names)).all():
            raise UserError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken at {self.site}"
            )

    def _merged_weight(self, names: Sequence[str]) -> Tensor:
        """Return the base weight with these adapters besides the merged ones, in its own layout and dtype."""
        merged = w0 = self.w0()
        for name in [*self.merged_adapters, *names]:
            merged = merged + self.adapter(name).delta_weight(w0)
        return (merged.T if self.frozen.transposed else merged).to(self.frozen.parameter().dtype).contiguous()

    def unmerge(self) -> None:
        """Put W0 back, exact to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", UserWarning, stacklevel=2)
            return
        assert self._kept_weight is not None
        self.frozen.parameter().data = self._stored_w0()
        self._kept_weight = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ΔW of one adapter in the layout of the base weight."""
        delta = self.adapter(adapter).delta_weight(self.w0())
        return delta.T if self.frozen.transposed else delta

    def w0(self) -> Tensor:
        """Return W0 (out, in), also while adapters are merged."""
        if self._kept_weight is None:
            return self.frozen.matrix().detach()
        kept = self._stored_w0()
        return kept.T if self.frozen.transposed else kept

    def _stored_w0(self) -> Tensor:
        """Return W0 as the base stores it, where the base weight is now: the model may have moved while merged."""
        weight = self.frozen.parameter().data
        return weight if self._kept_weight is None else self._kept_weight.to(weight.device, weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT that ΔW of this site can be computed."""
        return True
