"""How far two models are from each other on the same rows: logits, their distance, and the tokens they predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Agreement:
    """How two models compare at every position of the same rows."""

    reader: str
    """Who computed the second set of logits."""
    rows: int
    tokens: int
    largest_logit: float
    """Of the adapter as it was."""
    max_difference: float
    """Of any logit."""
    mean_difference: float
    kl: float
    """KL(adapter as it was ‖ reloaded) in nats per position."""
    same_top1: float
    """Share of positions at which both predict the same next token."""
    tolerance: float
    """Allowed `max_difference` as a share of `largest_logit`."""

    @property
    def passed(self) -> bool:
        """Whether the largest difference is allowed; NaN is not."""
        return self.max_difference <= self.tolerance * self.largest_logit

    def __str__(self) -> str:
        return (
            f"{self.reader}: logits (up to {self.largest_logit:.3g}) differ by {self.max_difference:.2g} at most and "
            f"{self.mean_difference:.2g} on average, KL {self.kl:.2g} nats, same top token at {self.same_top1:.2%} of "
            f"{self.tokens:,} positions"
        )


@torch.no_grad()
def model_logits(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the logits (tokens, vocabulary) of every row, in float32 on the CPU; of a classifier (1, classes)."""
    device = next(model.parameters()).device
    found = (model(input_ids=torch.tensor([list(row)], device=device)).logits for row in rows)
    return [logits.reshape(-1, logits.shape[-1]).float().cpu() for logits in found]


def compare(reader: str, before: Sequence[Tensor], after: Sequence[Tensor], tolerance: float) -> Agreement:
    """Return how the logits `after` of `reader` agree with those `before`; each is (tokens, vocabulary) per row."""
    tokens = sum(len(logits) for logits in before)
    differences = [(a - b).abs() for a, b in zip(before, after, strict=True)]
    kl = sum(_kl(a, b) for a, b in zip(before, after, strict=True))
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(before, after, strict=True))
    return Agreement(
        reader=reader,
        rows=len(before),
        tokens=tokens,
        largest_logit=max(float(logits.abs().max()) for logits in before),
        # of tensors, because max() of Python's would skip NaN
        max_difference=float(torch.stack([difference.max() for difference in differences]).max()),
        mean_difference=sum(float(d.double().mean()) * len(d) for d in differences) / tokens,
        kl=kl / tokens,
        same_top1=same / tokens,
        tolerance=tolerance,
    )


def _kl(before: Tensor, after: Tensor) -> float:
    """Return Σ over positions of KL(before ‖ after)."""
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return max(0.0, float(F.kl_div(q, p, reduction="sum", log_target=True)))
