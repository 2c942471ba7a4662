"""The loss of a training step under `transformers.Trainer`, with the head multiplied at labeled positions only.

The Trainer passes `labels` and `num_items_in_batch` and reads nothing but the loss. Calls that look otherwise (a plain
loop, evaluation, a trainer that wants logits) get the base model's own forward. TRL's SFTTrainer before 1.16 passes
`use_cache` besides: it reads logits, or the sums of its loss in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from loraplex.batch_loss.labeled import IGNORED, Head, first_look, frozen_head, labeled
from loraplex.batch_loss.trl import sums
from loraplex.batch_loss.verdicts import Verdicts
from loraplex.compat.transformers import ForCausalLMLoss
from loraplex.compat.trl import has_chunked_loss

_UNDERSTOOD = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels", "num_items_in_batch"} | {
    "return_dict",
    "output_attentions",
    "output_hidden_states",
}
_STANDARD: Verdicts[bool] = Verdicts()
"""Base models by whether their logits are the head's product with the last hidden state and nothing else."""


def compute_output(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], padding_free: bool | str
) -> CausalLMOutputWithPast | None:
    """Return an output that holds the loss alone, or None when the base model itself has to compute it.

    `padding_free` is as in `AdapterConfig`; False leaves the whole call to the base model.

    Raises:
        UserError: when `padding_free` is True and the batch cannot be packed.
    """
    labels, ids = kwargs.get("labels"), kwargs.get("input_ids")
    if args or padding_free is False or not isinstance(labels, Tensor) or not isinstance(ids, Tensor):
        return None
    understood = _UNDERSTOOD | {"use_cache"} if has_chunked_loss(model) else _UNDERSTOOD
    if kwargs.get("num_items_in_batch") is None or not kwargs.keys() <= understood:
        return None
    if kwargs.get("return_dict") is False or any(kwargs.get(f"output_{x}") for x in ("attentions", "hidden_states")):
        return None
    if not isinstance(model, PreTrainedModel) or model.loss_function is not ForCausalLMLoss:
        return None
    linear = frozen_head(model)
    if linear is None or not _is_standard(model, linear, ids):
        return None
    inputs = {key: value for key, value in kwargs.items() if key not in ("labels", "num_items_in_batch")}
    batch = labeled(model, (), inputs, labels, padding_free)
    log_probs, entropy, top = Head(linear).log_probs(batch.hidden(model.base_model), batch.targets)
    return sums(model, -log_probs.sum() / kwargs["num_items_in_batch"], entropy, top)


def mean_loss(model: nn.Module, batch: Mapping[str, Any], padding_free: bool | str) -> Tensor:
    """Return the mean loss over a batch's targets: as `compute_output` has it where it can, else as the model does."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2 and "num_items_in_batch" not in batch:
        items = (labels[:, 1:] != IGNORED).sum().clamp(min=1)
        output = compute_output(model, (), {**batch, "num_items_in_batch": items}, padding_free)
        if output is not None and output.loss is not None:
            return output.loss
    loss: Tensor = model(**batch).loss
    return loss


def _is_standard(model: PreTrainedModel, head: nn.Linear, ids: Tensor) -> bool:
    """Tell whether the model's logits are those of the head alone, from one look at a few tokens of the first batch."""

    def look() -> bool:
        logits, hidden = first_look(model, ids)
        return hidden is not None and Head(head).gives(logits, hidden)

    return _STANDARD.of(model, look)
