"""Causal attention of sequences laid end to end, for processors without a flash kernel worth the name.

On a CPU the backward pass of torch's own kernel costs seven times the products it consists of when the sequences are
short (0.18 ms against 1.40 ms for 95 tokens, nine heads of 64, bfloat16, two cores). Here it is those products.
Scores and their softmax are computed in float32, one key head at a time, so that they stay in the cache;
probabilities are kept in the dtype of the values, and only for sequences of at most `_KEPT` tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loraplex.compat.torch import once_differentiable, softmax_backward
from loraplex.kernels.autocast import autocast_dtype

LONGEST = 1024
"""Longest sequence this is meant for: beyond it a kernel that never holds the (L, L) matrix wins."""

_KEPT = 256
"""Longest sequence whose probabilities are kept for the backward pass; those of a longer one are computed again."""


def sequence_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
    """Return softmax(scale · q kᵀ, causal within each sequence) v as (1, T, heads, d).

    query (1, heads, T, d), key and value (1, key heads, T, d) with heads a multiple of key heads; T = Σ lengths. Under
    autocast all three get its dtype: rotated queries and keys come in float32, values as a linear left them.
    """
    dtype = autocast_dtype(value)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        output: Tensor = _SequenceAttention.apply(query, key, value, lengths, scale)  # type: ignore[no-untyped-call]
    return output


class _SequenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
        (_, heads, total, width), groups = query.shape, key.shape[1]
        output = query.new_empty(1, total, heads, width)
        kept = []
        start = 0
        for length in lengths:
            part = slice(start, start := start + length)
            q, k, v = _grouped(query, part, groups), key[0, :, part], value[0, :, part]
            p = _probabilities(q, k, length, scale).to(v.dtype)
            _ungrouped(output, part, groups).copy_(torch.bmm(p, v).view(groups, -1, length, width))
            if length <= _KEPT and any(ctx.needs_input_grad[:3]):
                kept.append(p)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        groups, scale = key.shape[1], ctx.scale
        # laid out as (T, heads, d), which is how the projections produced them
        dq, dk, dv = (torch.empty_like(t[0].transpose(0, 1)).unsqueeze(0) for t in (query, key, value))
        probabilities = iter(kept)
        start = 0
        for length in ctx.lengths:
            part = slice(start, start := start + length)
            q, k, v = _grouped(query, part, groups), key[0, :, part], value[0, :, part]
            do = _grouped(upstream.transpose(1, 2), part, groups)
            p = next(probabilities) if length <= _KEPT else _probabilities(q, k, length, scale).to(v.dtype)
            dv[0, part].copy_(torch.bmm(p.mT, do).transpose(0, 1))
            ds = softmax_backward(torch.bmm(do, v.mT), p, -1, p.dtype)
            _ungrouped(dq, part, groups).copy_(torch.bmm(ds, k).mul_(scale).view(groups, -1, length, q.shape[-1]))
            dk[0, part].copy_(torch.bmm(ds.mT, q).mul_(scale).transpose(0, 1))
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None, None


def _grouped(tensor: Tensor, part: slice, groups: int) -> Tensor:
    """Return one sequence of (1, heads, T, d) as (groups, heads/groups · L, d): the queries of a key head together."""
    return tensor[0, :, part].reshape(groups, -1, tensor.shape[-1])


def _ungrouped(tensor: Tensor, part: slice, groups: int) -> Tensor:
    """Return a view of one sequence of (1, T, heads, d) as (groups, heads/groups, L, d)."""
    rows = tensor[0, part]
    return rows.view(len(rows), groups, -1, tensor.shape[-1]).permute(1, 2, 0, 3)


def _probabilities(q: Tensor, k: Tensor, length: int, scale: float) -> Tensor:
    """Return the causal softmax (groups, heads/groups · L, L) of q (groups, heads/groups · L, d), k (groups, L, d)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    future = torch.full((length, length), float("-inf"), dtype=dtype, device=q.device).triu_(1)
    p = q.new_empty(*q.shape[:2], length)
    for head in range(len(q)):
        scores = torch.mm(q[head].to(dtype) * scale, k[head].to(dtype).T).view(-1, length, length)
        p[head].copy_(torch.softmax(scores.add_(future), -1).view(-1, length))
    return p
