"""torch beyond its documented names: hooks on modules and optimizers, versions of tensors, one kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Differentiable once only: kernels of ours have no second derivative.
from torch.autograd.function import once_differentiable as once_differentiable

# A linear layer whose weight torch reads without calling it (out_proj of nn.MultiheadAttention): it cannot be a site.
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as NonDynamicallyQuantizableLinear

# Hooks on every optimizer's step, which nothing else in torch offers for optimizers that others make.
from torch.optim.optimizer import register_optimizer_step_post_hook as register_optimizer_step_post_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook as register_optimizer_step_pre_hook

# Counts the operations of a step.
from torch.utils.flop_counter import FlopCounterMode as FlopCounterMode


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written in place: what is kept of it is stale when this has changed."""
    return tensor._version


def number_of_hooks(module: nn.Module) -> int:
    """Return how many hooks anybody has put on a module; its forward alone would pass them by."""
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)


def random_states(device: torch.device) -> list[bytes]:
    """Return the states of all generators that a forward pass may draw from: torch's, of the device too, and others.

    Nothing waits for the device: its generator's state is kept by the host.
    """
    import random

    import numpy as np

    states = [torch.get_rng_state().numpy().tobytes(), repr(random.getstate()).encode()]
    kind, keys, *rest = np.random.get_state(legacy=True)
    states.append(repr((kind, rest)).encode() + np.asarray(keys).tobytes())
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device).numpy().tobytes())
    return states


def child_of(module: nn.Module, name: str) -> nn.Module | None:
    """Return the module of that name inside `module`; None for anything else of that name, or nothing."""
    return module._modules.get(name)


def child_names(module: nn.Module) -> list[str]:
    """Return the names of the modules inside `module`, in their order."""
    return list(module._modules)


def softmax_backward(gradient: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return the gradient of a softmax's input from its output: torch's own kernel, in one pass over memory."""
    found: Tensor = torch._softmax_backward_data(gradient, output, dim, dtype)
    return found
