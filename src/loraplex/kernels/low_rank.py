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


def low_rank_linear(
    x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: Tensor
) -> Tensor:
    """Return y (..., out).

    x (..., in) and `dropped`, the same after dropout or None where there is none; W0 (out, in), b (out,) or None;
    A (r, in), B (out, r), s (r,) the scale of every rank, without gradient.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        dropped = None if dropped is None else dropped.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        y: Tensor = _LowRankLinear.apply(x, dropped, weight, bias, a, b, s)  # type: ignore[no-untyped-call]
    return y


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
        # the scale goes into B before it is rounded: rounding s itself would rescale the whole adapter
        a_cast, b_cast = a.to(rows.dtype), (b * s).to(rows.dtype)
        low = F.linear(low_rows, a_cast)  # (tokens, r)
        y = F.linear(rows, weight, bias)
        y.addmm_(low, b_cast.T)
        ctx.save_for_backward(low_rows, weight, a_cast, b_cast, s, low)
        ctx.shape, ctx.dtypes = x.shape, (a.dtype, b.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        low_rows, weight, a, b, s, low = ctx.saved_tensors
        need_x, need_dropped, _, need_bias, need_a, need_b, _ = ctx.needs_input_grad
        dy = upstream[0].reshape(-1, weight.shape[0])
        dlow = dy @ b  # (tokens, r)
        da = (dlow.T @ low_rows).to(ctx.dtypes[0]) if need_a else None
        db = (dy.T @ low).to(ctx.dtypes[1]).mul_(s) if need_b else None
        dx = ddropped = None
        if need_x:
            dx = dy @ weight
            if not need_dropped:
                dx.addmm_(dlow, a)
            dx = dx.view(ctx.shape)
        if need_dropped:
            ddropped = (dlow @ a).view(ctx.shape)
        return dx, ddropped, None, dy.sum(0) if need_bias else None, da, db, None
