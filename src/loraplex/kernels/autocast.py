"""What autocast would do to the tensors of a kernel that then runs without it."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives `tensor` in a product, None where it is off or the tensor is float64."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def under_autocast(
    x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return the tensors of a frozen linear in the dtype that autocast would give them, unchanged where it is off."""
    dtype = autocast_dtype(weight)
    if dtype is None:
        return x, dropped, weight, bias
    return (
        x.to(dtype),
        None if dropped is None else dropped.to(dtype),
        weight.to(dtype),
        (None if bias is None else bias.to(dtype)),
    )
