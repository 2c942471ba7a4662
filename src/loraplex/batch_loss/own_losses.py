"""The output of a training forward when adapters add a loss of their own: the trained loss tells what scales it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loraplex.batch_loss.labeled import IGNORED
from loraplex.errors import UserError
from loraplex.kernels.loss_scale import LossScale


def scaled_output(scale: LossScale, output: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return the output of a call with the arguments `kwargs`; what is trained of it tells `scale` by how much.

    That is the loss, or the log-probabilities of a fused head. A loss that is divided by the targets of all batches of
    an optimizer step (`num_items_in_batch`) counts with this batch's part of them.

    Raises:
        UserError: when the output has neither: whoever computes a loss out of the logits scales it unseen.
    """
    log_probs, loss = getattr(output, "log_probs", None), getattr(output, "loss", None)
    if isinstance(log_probs, Tensor):
        output.log_probs = scale.of_log_probs(log_probs)
    elif not isinstance(loss, Tensor):
        raise UserError(
            "balance cannot be scaled: this training computes its loss out of the logits, past the model (DPO, "
            "label smoothing, a loss of your own); set balance to 0, or give the model its labels"
        )
    if isinstance(loss, Tensor):
        output.loss = scale.of_loss(loss, _share(kwargs))
    return output


def _share(kwargs: Mapping[str, Any]) -> float | Tensor:
    """Return the batch's targets over those of the optimizer step; 1 where the loss is the batch's own mean."""
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    share: Tensor = (labels[:, 1:] != IGNORED).sum() / items
    return share
