"""accelerate beyond its documented names: the marks that it leaves on modules and optimizers."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_dispatched(module: nn.Module) -> bool:
    """Return whether accelerate has put a hook on a module, which may move its weights or its input."""
    return hasattr(module, "_hf_hook")


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer that accelerate has wrapped, or the one that is given."""
    return getattr(optimizer, "optimizer", optimizer)
