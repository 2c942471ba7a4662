"""By what a training loss is scaled on its way to the parameters: gradient accumulation, a gradient scaler, a trainer.

A term that is in the graph as its gradient alone (`routed.balanced`) has to be scaled like the loss beside it. How that
is scaled is known in the backward pass only: the loss itself is let through here, and notes its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loraplex.errors import UserError


class LossScale:
    """Notes the gradient of losses that pass through, and gives it to the terms behind them in the backward pass."""

    def __init__(self) -> None:
        self._value: Tensor | None = None

    def of_loss(self, loss: Tensor, share: float | Tensor = 1.0) -> Tensor:
        """Return a loss () as it is; its gradient times `share` is the scale.

        `share` is the batch's part of the loss where the loss is divided by more than the batch: its targets over all
        of the optimizer step's.
        """
        through: Tensor = _Through.apply(loss, self, share)  # type: ignore[no-untyped-call]
        return through

    def of_log_probs(self, log_probs: Tensor) -> Tensor:
        """Return the log-probabilities of targets as they are; minus the sum of their gradients is the scale.

        Whoever takes the mean of n of them gives each −1/n.
        """
        through: Tensor = _Through.apply(log_probs, self, -1.0)  # type: ignore[no-untyped-call]
        return through

    def read(self) -> Tensor:
        """Return the scale (), in the backward pass.

        Raises:
            UserError: when no loss has passed through: the training computes one of its own.
        """
        if self._value is None:
            raise UserError(
                "balance has nothing to scale its loss by: this training computes its loss out of the logits, past the "
                "model; set balance to 0, or use the loss of Trainer or SFTTrainer"
            )
        return self._value

    def note(self, value: Tensor) -> None:
        """Take over the scale of the loss whose backward pass begins."""
        self._value = value


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: LossScale, share: float | Tensor) -> Tensor:
        ctx.scale, ctx.share = scale, share
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        ctx.scale.note(upstream[0].detach().sum() * ctx.share)
        return upstream[0], None, None
