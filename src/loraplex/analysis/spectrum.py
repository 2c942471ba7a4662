"""The singular values of BA without forming it."""

from __future__ import annotations

import torch
from torch import Tensor


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Return the singular values of BA, largest first, min(r, in, out) of them in float64.

    A (r, in), B (out, r). With Aᵀ = Q R and B = P S (both reduced QR) BA = P (S Rᵀ) Qᵀ, and orthonormal columns keep
    singular values, so those of the small S Rᵀ are meant.
    """
    r = torch.linalg.qr(a.detach().double().T, mode="r").R  # (min(in, r), r)
    s = torch.linalg.qr(b.detach().double(), mode="r").R  # (min(out, r), r)
    values: Tensor = torch.linalg.svdvals(s @ r.T)
    return values


def stable_rank(values: Tensor) -> float:
    """Return ‖M‖²_F / ‖M‖²_2 of a matrix with these singular values: how many directions carry it; 0 for M = 0."""
    largest = float(values.max()) if len(values) else 0.0
    return float((values / largest).square().sum()) if largest else 0.0
