"""Log-probabilities of labels from two hidden states of every position, one the other's teacher, under a frozen head.

As in `label_head`, the logits of a few positions at a time exist only inside the forward pass, which also computes the
gradients: (d,) per position and side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex.kernels.label_head import LOGITS_AT_ONCE, head_logits, row_dot, through_head


@dataclass(frozen=True)
class Weights:
    """Weights of the three terms, and the temperature of the third."""

    teacher: float
    student: float
    distillation: float
    temperature: float = 1.0


@dataclass(frozen=True)
class Distilled:
    """Per position, each (n,)."""

    objective: Tensor
    """λ_T log p_T(label) + λ_S log p_S(label) − λ_D τ² KL: alone in having a gradient."""
    teacher: Tensor
    """log p_T(label)."""
    student: Tensor
    """log p_S(label)."""
    divergence: Tensor
    """τ² KL(softmax(z_T/τ) ‖ softmax(z_S/τ))."""
    entropy: Tensor
    """Of p_S."""
    top: Tensor
    """Whether the label is the student's most likely token."""


def distilled_log_probs(
    teacher: Tensor,
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Weights,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Distilled:
    """Return λ_T log p_T(label) + λ_S log p_S(label) − λ_D τ² KL(softmax(z_T/τ) ‖ softmax(z_S/τ)) and its parts.

    teacher and student (n, d), head weight (V, d), bias (V,) or None, labels (n,); z = cap(scale · (h Wᵀ + b)), in
    float32, or float64 where the inputs are. In the divergence the teacher is a constant; only `objective` has a
    gradient, with respect to `teacher` and `student`.
    """
    fields = _Distilled.apply(  # type: ignore[no-untyped-call]
        teacher, student, weight, bias, labels, weights, scale, softcap
    )
    return Distilled(*fields)


class _Distilled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        teacher: Tensor,
        student: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Weights,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(student.dtype, torch.float32)
        fields = student.new_empty(5, len(labels), dtype=dtype)
        top = torch.empty_like(labels, dtype=torch.bool)
        units = [torch.empty_like(teacher), torch.empty_like(student)]
        # two matrices of logits at a time
        step = max(1, LOGITS_AT_ONCE // (2 * weight.shape[0]))
        for start in range(0, len(labels), step):
            part = slice(start, start + step)
            z_t, z_s = (head_logits(h[part], weight, bias, dtype, scale, softcap) for h in (teacher, student))
            label = labels[part, None]
            log_t, log_s = torch.log_softmax(z_t, 1), torch.log_softmax(z_s, 1)
            chosen_t, chosen_s = log_t.gather(1, label)[:, 0], log_s.gather(1, label)[:, 0]
            p_s = log_s.exp()
            entropy = -row_dot(p_s, log_s)
            top[part] = z_s.argmax(1) == labels[part]
            divergence, d_divergence = _divergence(z_t, z_s, weights.temperature)
            objective = weights.teacher * chosen_t + weights.student * chosen_s - weights.distillation * divergence
            fields[:, part] = torch.stack([objective, chosen_t, chosen_s, divergence, entropy])
            ones = torch.ones_like(chosen_t)[:, None]
            dz_t = log_t.exp_().neg_().scatter_add_(1, label, ones).mul_(weights.teacher)
            dz_s = p_s.neg_().scatter_add_(1, label, ones).mul_(weights.student)
            dz_s -= weights.distillation * d_divergence
            for unit, dz, z in zip(units, (dz_t, dz_s), (z_t, z_s), strict=True):
                unit[part] = through_head(dz, z, weight, scale, softcap)
        objective, *parts = fields
        ctx.mark_non_differentiable(*parts, top)
        ctx.save_for_backward(*units)
        return objective, *parts, top

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        teacher, student = ((upstream[0][:, None] * unit).to(unit.dtype) for unit in ctx.saved_tensors)
        return teacher, student, None, None, None, None, None, None


def _divergence(z_t: Tensor, z_s: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return τ² KL(p ‖ q) (n,) of p = softmax(z_T/τ), q = softmax(z_S/τ), and τ (q − p), its gradient by z_S."""
    log_p, log_q = torch.log_softmax(z_t / temperature, 1), torch.log_softmax(z_s / temperature, 1)
    p = log_p.exp()
    divergence = temperature**2 * row_dot(p, log_p - log_q)
    return divergence, log_q.exp_().sub_(p).mul_(temperature)
