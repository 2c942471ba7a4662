"""Frozen linear plus N heads over one A, weighed by a router, in one autograd function.

y = x W0ᵀ + b + Σ_i g_i (drop(x) Aᵀ) (B_i diag(s))ᵀ with g = softmax(x W_gᵀ) per row, computed in the dtype of the
frozen weight (or of autocast), the softmax in float32 at least. All heads are one product, (g ⊗ a) [B_1 … B_N]ᵀ, and
without dropout A and the router are one product too. Saved for the backward pass: x, the (tokens, r + N) product, the
gates and the casts of the trained matrices; g ⊗ a (tokens, N·r) is formed again.

A loss that balances the heads, w (N Σ_i ḡ_i² − 1) of the means ḡ over the rows, is there as its gradient alone, added
where the gates' own gradient comes by: no trainer has to know of it, and recomputation does not do it twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loraplex.kernels.autocast import under_autocast
from loraplex.kernels.loss_scale import LossScale


def routed_linear(
    x: Tensor,
    dropped: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    router: Tensor,
    top_k: int | None = None,
    balance: float = 0.0,
    scale: LossScale | None = None,
) -> tuple[Tensor, Tensor]:
    """Return y (..., out) and the gates g (tokens, N), both differentiable.

    x (..., in) and `dropped`, the same after dropout or None where there is none; W0 (out, in), b (out,) or None;
    A (r, in), B (out, N·r) head after head, s (N·r,) the scale of every column of B, the same for every head and
    without gradient; W_g (N, in). With `top_k` the softmax is over the k largest logits of a row, other gates are 0.
    `balance` is the weight w of the balancing loss, which is scaled by `scale`, by 1 where that is None.
    """
    x, dropped, weight, bias = under_autocast(x, dropped, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        y, gates = _RoutedLinear.apply(  # type: ignore[no-untyped-call]
            x, dropped, weight, bias, a, b, s, router, top_k, balance, scale
        )
    return y, gates


def softmax_gates(logits: Tensor, top_k: int | None = None) -> Tensor:
    """Return g (..., N), the softmax of logits (..., N) in float32 at least, over the `top_k` largest where given."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if top_k is not None and top_k < logits.shape[-1]:
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.topk(top_k, dim=-1).indices, True)
        logits = logits.masked_fill(~kept, -torch.inf)
    # over the outermost dimension, which a CPU does many rows of at once
    return logits.movedim(-1, 0).contiguous().softmax(0).movedim(0, -1).contiguous()


def weighed(gates: Tensor, low: Tensor, s: Tensor | None = None) -> Tensor:
    """Return g ⊗ (a s) (..., N·r) of gates (..., N), a (..., r) and s (r,) in the dtype of a, head after head."""
    scaled = low if s is None else low * s
    return (gates.unsqueeze(-1) * scaled.unsqueeze(-2)).flatten(-2).to(low.dtype)


def balanced(gates: Tensor, weight: float, scale: LossScale | None = None) -> Tensor:
    """Return the gates g (..., N) as they are; their gradient gets that of weight · (N Σ_i ḡ_i² − 1) added.

    It is multiplied with what the loss is scaled by, `scale`; by 1 where that is None.

    With Σ_i ḡ_i = 1 this is the squared coefficient of variation of the heads' loads, the importance loss of Shazeer et
    al., Outrageously large neural networks (arXiv 1701.06538, section 4). ḡ are the means over all leading dimensions.
    """
    return _Balanced.apply(gates, weight, scale) if weight else gates  # type: ignore[no-untyped-call]


def _balance_gradient(gates: Tensor, weight: float, scale: LossScale | None) -> Tensor:
    """Return ∂/∂g (N,), the same for every one of the T rows: scale · weight · 2 N ḡ_i / T."""
    rows = gates.reshape(-1, gates.shape[-1])
    gradient = 2 * weight * rows.shape[1] / len(rows) * rows.mean(0)
    return gradient if scale is None else gradient * scale.read().to(gradient)


class _Balanced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: float, scale: LossScale | None) -> Tensor:
        ctx.save_for_backward(gates)
        ctx.weight, ctx.scale = weight, scale
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gates,) = ctx.saved_tensors
        return upstream[0] + _balance_gradient(gates, ctx.weight, ctx.scale), None, None


class _RoutedLinear(torch.autograd.Function):
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
        router: Tensor,
        top_k: int | None,
        balance: float,
        scale: LossScale | None,
    ) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        low_rows = None if dropped is None else dropped.reshape(rows.shape)
        both, b_cast = torch.cat([a.to(rows.dtype), router.to(rows.dtype)]), b.to(rows.dtype)
        if low_rows is None:
            low, logits = F.linear(rows, both).split([len(a), len(router)], dim=1)
        else:
            low, logits = F.linear(low_rows, both[: len(a)]), F.linear(rows, both[len(a) :])
        gates = softmax_gates(logits, top_k)
        # s goes where the fewest numbers are, and into them before they are rounded: a rounded s would rescale all
        y = F.linear(rows, weight, bias).addmm_(weighed(gates, low, s[: len(a)]), b_cast.T)
        ctx.save_for_backward(rows, low_rows, weight, both, b_cast, s, low, gates)
        ctx.shape, ctx.dtypes, ctx.balance = x.shape, (a.dtype, b.dtype, router.dtype), balance
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return y.view(*x.shape[:-1], y.shape[-1]), gates

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, low_rows, weight, both, b, s, low, gates = ctx.saved_tensors
        need_x, need_dropped, _, need_bias, *_ = ctx.needs_input_grad
        given_y, given_gates = upstream
        dy = rows.new_zeros(len(rows), len(weight)) if given_y is None else given_y.reshape(-1, len(weight))
        r = low.shape[1]
        heads = (dy @ b).view(len(rows), -1, r).to(gates.dtype)  # (tokens, N, r)
        dlow = (heads * gates.unsqueeze(2)).sum(1) * s[:r]
        dgates = (heads * (low * s[:r]).unsqueeze(1)).sum(2)
        if given_gates is not None:
            dgates = dgates + given_gates
        if ctx.balance:
            dgates = dgates + _balance_gradient(gates, ctx.balance, ctx.scale)
        dlogits = gates * (dgates - (gates * dgates).sum(1, keepdim=True))
        dboth = torch.cat([dlow, dlogits], dim=1).to(rows.dtype)  # (tokens, r + N)
        db = (dy.T @ weighed(gates, low, s[:r])).to(ctx.dtypes[1])
        if low_rows is None:
            da, drouter = (dboth.T @ rows).split([r, gates.shape[1]])
        else:
            da, drouter = dboth[:, :r].T @ low_rows, dboth[:, r:].T @ rows
        dx = ddropped = None
        if need_x:
            dx = dy @ weight
            first = 0 if low_rows is None else r
            dx = dx.addmm_(dboth[:, first:], both[first:]).view(ctx.shape)
        if need_dropped:
            ddropped = (dboth[:, :r] @ both[:r]).view(ctx.shape)
        dbias = dy.sum(0) if need_bias else None
        return dx, ddropped, None, dbias, da.to(ctx.dtypes[0]), db, None, drouter.to(ctx.dtypes[2]), None, None, None
