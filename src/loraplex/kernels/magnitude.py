"""DoRA's linear in one autograd function: y = (m/n) ⊙ (x W0ᵀ + (x Aᵀ) (B diag(s))ᵀ) + b.

n = ‖W0 + B diag(s) A‖ per row is a constant of the backward pass (arXiv 2402.09353, section 4.3), so
dm = Σ dy ⊙ z / n with z the bracket, and everything below sees (m/n) ⊙ dy. BA is never formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loraplex.kernels.low_rank import backward_products, under_autocast

_AT_ONCE = 1 << 18
"""Elements of W0 that are held in float32 at the same time: 1 MiB, in memory that stays warm."""


def magnitude_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: Tensor, m: Tensor, square: Tensor
) -> Tensor:
    """Return y (..., out).

    x (..., in), W0 (out, in), b (out,) or None, A (r, in), B (out, r), s (r,) the scale of every rank, m (out,) and
    `square` = ‖W0‖² per row (out,).
    """
    x, _, weight, bias = under_autocast(x, None, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _MagnitudeLinear.apply(x, weight, bias, a, b, s, m, square)  # type: ignore[no-untyped-call]
    return y


def squared_row_norm(weight: Tensor) -> Tensor:
    """Return ‖W0‖² per row (out,), in float32 at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.cat([part.square().sum(1) for part in _row_blocks(weight, dtype)])


def row_norm(weight: Tensor, a: Tensor, b: Tensor, square: Tensor) -> Tensor:
    """Return n = ‖W0 + BA‖ per row (out,) without forming BA, detached.

    n² = ‖W0‖² + 2·rowsum((W0 Aᵀ) ⊙ B) + rowsum((B (A Aᵀ)) ⊙ B), in float32 at least and with autocast off, because
    bfloat16 products leave a relative error of 2.5e-3; n² is clamped at the smallest normal number, because the sum
    may cancel and a row of W0 may be zero. `square` is ‖W0‖² (out,); W0 is cast a few rows at a time.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        dtype = square.dtype
        a, b = a.to(dtype), b.to(dtype)
        cross = torch.cat([part @ a.T for part in _row_blocks(weight, dtype)])
        inner = torch.addmm(cross.mul_(2), b, a @ a.T)
        return positive_root(square + torch.linalg.vecdot(inner, b))


def positive_root(square: Tensor) -> Tensor:
    """Return √n² (out,), n² clamped at the smallest normal number: no row has norm 0, so m / n is finite."""
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()


def _row_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the rows of W0 in `dtype`, some at a time and all in the same memory: valid until the next is asked for."""
    if weight.dtype == dtype:
        yield weight
        return
    rows = max(1, _AT_ONCE // weight.shape[1])
    block = torch.empty(min(rows, len(weight)), weight.shape[1], dtype=dtype, device=weight.device)
    for part in weight.split(rows):
        yield block[: len(part)].copy_(part)


class _MagnitudeLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        s: Tensor,
        m: Tensor,
        square: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scaled = b * s
        n = row_norm(weight, a, scaled, square)
        a_cast, b_cast = a.to(rows.dtype), scaled.to(rows.dtype)
        low = F.linear(rows, a_cast)  # (tokens, r)
        z = F.linear(rows, weight).addmm_(low, b_cast.T)  # (tokens, out)
        ratio = (m / n).to(z.dtype)
        y = z * ratio if bias is None else torch.addcmul(bias, z, ratio)
        ctx.save_for_backward(rows, weight, a_cast, b_cast, s, low, z, ratio, n)
        ctx.shape, ctx.dtypes, ctx.m_dtype = x.shape, (a.dtype, b.dtype), m.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, s, low, z, ratio, n = ctx.saved_tensors
        need_x, _, need_bias, *_ = ctx.needs_input_grad
        dy = upstream[0].reshape(-1, weight.shape[0])
        product = dy * z
        dm = (product.sum(0, dtype=n.dtype) / n).to(ctx.m_dtype)
        dz = torch.mul(dy, ratio, out=product)
        dlow, da, db = backward_products(dz, rows, low, a, b, s, ctx.dtypes)
        dx = (dz @ weight).addmm_(dlow, a).view(ctx.shape) if need_x else None
        return dx, None, dy.sum(0) if need_bias else None, da, db, None, dm, None
