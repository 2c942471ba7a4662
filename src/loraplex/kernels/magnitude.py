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

from loraplex.kernels.autocast import under_autocast
from loraplex.kernels.low_rank import Pair, leading

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

    n² = ‖W0‖² + 2·rowsum((W0 Aᵀ) ⊙ B) + rowsum((B (A Aᵀ)) ⊙ B), with the accuracy of float32 at least and with
    autocast off, because bfloat16 products leave a relative error of 2.5e-3; n² is clamped at the smallest normal
    number, because the sum may cancel and a row of W0 may be zero. `square` is ‖W0‖² (out,). A and B may be in any
    type; what they are rounded to is what is measured.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        dtype = square.dtype
        cross, a, b = _cross(weight, a), a.to(dtype), b.to(dtype)
        inner = torch.addmm(cross, b, a @ a.T, beta=2)
        return positive_root(square + torch.linalg.vecdot(inner, b))


def _cross(weight: Tensor, a: Tensor) -> Tensor:
    """Return W0 Aᵀ (out, r) with the accuracy of A's type, float32 at least.

    Where both are in bfloat16, W0 Aᵀ is a product P, rounded, and what rounding took from it, W0 Aᵀ − P, which is
    summed up in float32 and rounded itself. Two passes over W0 in the type that processors are fast in, instead of a
    cast of all of it.
    """
    if weight.dtype != torch.bfloat16 or a.dtype != torch.bfloat16:
        dtype = torch.promote_types(a.dtype, torch.float32)
        return torch.cat([part @ a.to(dtype).T for part in _row_blocks(weight, dtype)])
    product = weight @ a.T
    return torch.addmm(product, weight, a.T, beta=-1).float().add_(product)


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
        ctx.pair = Pair.of(a, b)
        a, b = leading(a, b, s)
        a_cast, b_cast = a.to(rows.dtype), (b * s).to(rows.dtype)
        # of the pair as it is multiplied below, rounded like it
        n = row_norm(weight, a_cast, b_cast, square)
        low = F.linear(rows, a_cast)  # (tokens, k)
        z = F.linear(rows, weight).addmm_(low, b_cast.T)  # (tokens, out)
        ratio = (m / n).to(z.dtype)
        y = z * ratio if bias is None else torch.addcmul(bias, z, ratio)
        # z, not y: what is returned may be changed in place by whoever gets it
        ctx.save_for_backward(rows, weight, a_cast, b_cast, s, low, z, ratio, n)
        ctx.shape, ctx.m_dtype = x.shape, m.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, s, low, z, ratio, n = ctx.saved_tensors
        need_x, _, need_bias, *_ = ctx.needs_input_grad
        dy = upstream[0].reshape(-1, weight.shape[0])
        product = dy * z
        dm = (_column_sums(product) / n).to(ctx.m_dtype)
        column = ratio[:, None]
        # m/n goes to whichever side of a product is smaller
        dlow, da, db = ctx.pair.gradients(dy, rows, low, b * column, s)
        dx = None
        if need_x:
            wide = weight.shape[1] < len(dy)
            dx = dy @ (weight * column) if wide else torch.mul(dy, ratio, out=product) @ weight
            dx = dx.addmm_(dlow, a).view(ctx.shape)
        return dx, None, dy.sum(0) if need_bias else None, da, db.mul_(column), None, dm, None


def _column_sums(values: Tensor) -> Tensor:
    """Return the sums (out,) over the tokens of (tokens, out), added up in float32 at least."""
    if values.dtype != torch.bfloat16:
        return values.sum(0, dtype=torch.promote_types(values.dtype, torch.float32))
    # as a product: the same accuracy as da and db, in less time than a sum in float32
    return (values.new_ones(1, len(values)) @ values)[0].float()
