"""Frozen linear plus low-rank addition in one autograd function.

y = x W0ᵀ + b + (drop(x) Aᵀ) (B diag(s))ᵀ, computed in the dtype of the frozen weight (or of autocast); A and B may be
kept in float32, their casts are made inside. Saved for the backward pass: x (which the caller holds anyway), the
(tokens, k) product and the casts of A and B. W0 has no gradient; that of x is skipped where nobody asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    A (r, in), B (out, r), s (k,) the scale of the first k ranks, without gradient; those beyond have scale 0, and
    nothing is computed for them but their gradient, which is 0.
    """
    x, dropped, weight, bias = under_autocast(x, dropped, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _LowRankLinear.apply(x, dropped, weight, bias, a, b, s)  # type: ignore[no-untyped-call]
    return y


def leading(a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return what of A (r, in) and B (out, r) has one of the scales s (k,): their first k ranks."""
    return (a, b) if len(s) == len(a) else (a[: len(s)], b[:, : len(s)])


@dataclass(frozen=True)
class Pair:
    """What of A (r, in) and B (out, r) is multiplied: their first k ranks; and how their gradients are to come."""

    ranks: int
    """r."""
    dtypes: tuple[torch.dtype, torch.dtype]

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Pair:
        """Return that of A and B as they are trained."""
        return cls(len(a), (a.dtype, b.dtype))

    def gradients(self, dy: Tensor, rows: Tensor, low: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return d(low) (tokens, k), dA (r, in) and dB (out, r) for y = … + low (B diag(s))ᵀ, low = rows Aᵀ.

        dy (tokens, out), rows (tokens, in), s (k,); `b` (out, k) is B diag(s).
        """
        dlow = dy @ b
        da, db = dlow.T @ rows, dy.T @ low
        if len(s) == self.ranks:
            return dlow, da.to(self.dtypes[0]), db.to(self.dtypes[1]).mul_(s)
        all_a = da.new_zeros(self.ranks, da.shape[1], dtype=self.dtypes[0])
        all_b = db.new_zeros(len(db), self.ranks, dtype=self.dtypes[1])
        all_a[: len(s)] = da
        torch.mul(db, s, out=all_b[:, : len(s)])
        return dlow, all_a, all_b


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
        ctx.pair = Pair.of(a, b)
        a, b = leading(a, b, s)
        # a rounded s would rescale the whole adapter, so it goes into B before the cast
        a_cast, b_cast = a.to(rows.dtype), (b * s).to(rows.dtype)
        low = F.linear(low_rows, a_cast)  # (tokens, k)
        y = F.linear(rows, weight, bias).addmm_(low, b_cast.T)
        ctx.save_for_backward(low_rows, weight, a_cast, b_cast, s, low)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        low_rows, weight, a, b, s, low = ctx.saved_tensors
        need_x, need_dropped, _, need_bias, *_ = ctx.needs_input_grad
        dy = upstream[0].reshape(-1, weight.shape[0])
        dlow, da, db = ctx.pair.gradients(dy, low_rows, low, b, s)
        dx = ddropped = None
        if need_x:
            dx = dy @ weight
            if not need_dropped:
                dx.addmm_(dlow, a)
            dx = dx.view(ctx.shape)
        if need_dropped:
            ddropped = (dlow @ a).view(ctx.shape)
        return dx, ddropped, None, dy.sum(0) if need_bias else None, da, db, None
