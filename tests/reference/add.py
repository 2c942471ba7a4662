"""Combine by addition, by the book: y = x (W0 + BA)ᵀ + b, with BA formed."""

from torch import Tensor

from loraplex import Add

VARIANTS = [Add()]


def weight(options: Add, w0: Tensor, a: Tensor, b: Tensor, gate: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """Return W' (out, in)."""
    return w0 + b @ a
