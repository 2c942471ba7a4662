"""Log-probabilities of labels under a frozen language-model head, with memory constant in the vocabulary.

The logits of a few positions at a time exist only inside the forward pass. Because every log-probability depends on
its own hidden state alone, its gradient is computed there as well, (d,) per position, and the backward pass only
scales it: the head is multiplied twice in all, not three times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LOGITS_AT_ONCE = 1 << 24
"""Elements of the logits matrix that exist at the same time: 64 MiB in float32."""


def label_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p(label), the entropy of p and whether the label is the most likely token, each (n,).

    hidden (n, d), head weight (V, d), bias (V,) or None, labels (n,). p = softmax(cap(scale · (hidden Wᵀ + b))) with
    cap(z) = softcap · tanh(z / softcap); computed in float32, or float64 where the inputs are. Only the log-probability
    has a gradient, and only with respect to `hidden`.
    """
    log_probs, entropy, top = _LabelLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, scale, softcap
    )
    return log_probs, entropy, top


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, scale: float, softcap: float | None
) -> Tensor:
    """Return z (n, V) = cap(scale · (hidden Wᵀ + b)) in `dtype`; see `label_log_probs`."""
    z = F.linear(hidden, weight, bias).to(dtype)
    if scale != 1.0:
        z *= scale
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ_j a_ij b_ij (n,) of a and b (n, V) in their own dtype: autocast would round both to its own."""
    with torch.autocast(a.device.type, enabled=False):
        products: Tensor = torch.linalg.vecdot(a, b)
    return products


def through_head(dz: Tensor, z: Tensor, weight: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Return the gradient (n, d) of the hidden states from that of z = `head_logits`, (n, V), which is overwritten."""
    if softcap is not None:
        dz *= 1 - (z / softcap).square()
    return (dz.mul_(scale) if scale != 1.0 else dz).to(weight.dtype) @ weight


class _LabelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_probs, entropy = hidden.new_empty(2, len(labels), dtype=dtype)
        top = torch.empty_like(labels, dtype=torch.bool)
        unit = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        step = max(1, LOGITS_AT_ONCE // weight.shape[0])
        for start in range(0, len(labels), step):
            part = slice(start, start + step)
            z = head_logits(hidden[part], weight, bias, dtype, scale, softcap)
            chosen = z.gather(1, labels[part, None])[:, 0]
            top[part] = z.argmax(1) == labels[part]
            norm = torch.logsumexp(z, dim=1)
            log_probs[part] = chosen - norm
            p = (z - norm[:, None]).exp_()
            entropy[part] = norm - row_dot(p, z)
            if unit is not None:
                # ∂ log p(label) / ∂z = onehot − p
                dz = p.neg_().scatter_add_(1, labels[part, None], torch.ones_like(norm)[:, None])
                unit[part] = through_head(dz, z, weight, scale, softcap)
        ctx.mark_non_differentiable(entropy, top)
        ctx.save_for_backward(unit)
        return log_probs, entropy, top

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        return (upstream[0][:, None] * unit).to(unit.dtype), None, None, None, None, None
