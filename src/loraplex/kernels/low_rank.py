"""Frozen linear plus low-rank addition in one autograd function.

y = x W0ᵀ + b + (drop(x) Aᵀ) (B diag(s))ᵀ, computed in the dtype of the frozen weight (or of autocast); A and B may be
kept in float32, their casts are made inside. Saved for the backward pass: x (which the caller holds anyway), the
(tokens, r) product and the casts of A and B. W0 has no gradient; that of x is skipped where nobody asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loraplex.kernels.autocast import under_autocast


def low_rank_linear(
    x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: Tensor
) -> Tensor:
    """Return y (..., out).

    x (..., in) and `dropped`, the same after dropout or None where there is none; W0 (out, in), b (out,) or None;
    A (r, in), B (out, r), s (r,) the scale of every rank, without gradient.
    """
    x, dropped, weight, bias = under_autocast(x, dropped, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _LowRankLinear.apply(x, dropped, weight, bias, a, b, s)  # type: ignore[no-untyped-call]
    return y


def backward_products(
    dy: Tensor, rows: Tensor, low: Tensor, a: Tensor, b: Tensor, s: Tensor, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d(low) (tokens, r), dA (r, in) and dB (out, r) for y = … + low (B diag(s))ᵀ, low = rows Aᵀ.

    dy (tokens, out), rows (tokens, in); `b` is B diag(s); the gradients come in the dtypes of A and B.
    """
    dlow = dy @ b
    return dlow, (dlow.T @ rows).to(dtypes[0]), (dy.T @ low).to(dtypes[1]).mul_(s)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        s: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low_rows = rows if dropped is None else dropped.reshape(rows.shape)
        # a rounded s would rescale the whole adapter, so it goes into B before the cast
        a_cast, b_cast = a.to(rows.dtype), (b * s).to(rows.dtype)
        low = F.linear(low_rows, a_cast)  # (tokens, r)
        y = F.linear(rows, weight, bias).addmm_(low, b_cast.T)
        ctx.save_for_backward(low_rows, weight, a_cast, b_cast, s, low)
        ctx.shape, ctx.dtypes = x.shape, (a.dtype, b.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        low_rows, weight, a, b, s, low = ctx.saved_tensors
        need_x, need_dropped, _, need_bias, *_ = ctx.needs_input_grad
        dy = upstream[0].reshape(-1, weight.shape[0])
        dlow, da, db = backward_products(dy, low_rows, low, a, b, s, ctx.dtypes)
        dx = ddropped = None
        if need_x:
            dx = dy @ weight
            if not need_dropped:
                dx.addmm_(dlow, a)
            dx = dx.view(ctx.shape)
        if need_dropped:
            ddropped = (dlow @ a).view(ctx.shape)
        return dx, ddropped, None, dy.sum(0) if need_bias else None, da, db, None
