"""Truncated singular value decomposition that comes out the same wherever it is computed again.

Randomized subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4) from a seeded start, in float64
with the signs fixed: thread counts and devices then change nothing that float32 would show.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SEED = 42
_OVERSAMPLING = 10
_ITERATIONS = 10


def truncated_svd(weight: Tensor, rank: int, *, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, r), S (r,) and Vᵀ (r, in) in float64 with U diag(S) Vᵀ ≈ `weight` (out, in), r = `rank`.

    `exact` takes the full decomposition instead of the randomized one. Of each column of U the entry of largest size
    is positive.
    """
    assert 1 <= rank <= min(weight.shape)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        w = weight.detach().to("cpu" if weight.device.type == "mps" else weight.device).double()
        if exact:
            u, s, vh = torch.linalg.svd(w, full_matrices=False)
        else:
            basis = _range(w, min(rank + _OVERSAMPLING, *w.shape))
            u, s, vh = torch.linalg.svd(basis.T @ w, full_matrices=False)
            u = basis @ u
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        largest = u.abs().argmax(0)
        signs = torch.where(u.gather(0, largest[None])[0] < 0, -1.0, 1.0).to(u)
        return u * signs, s, vh * signs[:, None]


def _range(w: Tensor, columns: int) -> Tensor:
    """Return an orthonormal basis (out, columns) of what `w` (out, in) maps to most strongly."""
    start = torch.randn(w.shape[1], columns, generator=torch.Generator().manual_seed(_SEED), dtype=w.dtype)
    basis: Tensor = torch.linalg.qr(w @ start.to(w.device)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(w @ torch.linalg.qr(w.T @ basis).Q).Q
    return basis
