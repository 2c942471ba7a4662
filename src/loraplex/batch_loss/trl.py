"""Answers TRL's trainers with the head multiplied at labeled positions only.

TRL's trainers put a fused head on the base model and read per-token fields of its output. Away from Triton devices it
projects every position. Where it asks for what `label_log_probs` computes, the tuner's forward answers instead, with
the same fields; in every other case TRL's own function runs. Before 1.16 SFTTrainer puts a loss in chunks there instead
and reads sums, see `sums`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from loraplex.batch_loss.labeled import Head, frozen_head, labeled
from loraplex.compat.trl import ChunkedOutput, fused_head_settings, fused_output, has_chunked_loss

_FIELDS = {"log_probs", "entropy", "is_top1"}
"""What SFTTrainer asks for. It uses the entropy as a metric; others differentiate it, so they get TRL's function."""

OF_THE_HEAD = {"labels", "shift_labels", "fused_lm_head", "num_items_in_batch"}
"""Arguments that the backbone does not get."""


def compute_output(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], padding_free: bool | str = False
) -> Any | None:
    """Return TRL's output for this call, or None when TRL's own function has to compute it.

    `model` is the base model on which TRL has put its head; `padding_free` is as in `AdapterConfig`.

    Raises:
        UserError: when `padding_free` is True and the batch cannot be packed.
    """
    settings = settings_of(model)
    labels = kwargs.get("labels")
    if settings is None or labels is None or kwargs.get("shift_labels") is not None:
        return None
    if kwargs.get("output_router_logits") or getattr(settings["text_config"], "output_router_logits", False):
        return None
    linear = frozen_head(model)
    if linear is None:
        return None
    inputs = {k: v for k, v in kwargs.items() if k not in OF_THE_HEAD}
    batch = labeled(model, args, inputs, labels, padding_free)
    head = Head(linear, settings["logit_scale"], settings["final_logit_softcapping"])
    fields = head.log_probs(batch.hidden(getattr(model, settings["backbone_attr"])), batch.targets)
    return output(batch.mask, *fields, items=kwargs.get("num_items_in_batch"))


def settings_of(model: nn.Module) -> dict[str, Any] | None:
    """Return what TRL's head was made with, None when it is not there or asks for more than we compute."""
    settings = fused_head_settings(model)
    if settings is None:
        return None
    plain = settings["temperature"] == 1.0 and not settings["cast_lm_head_to_fp32"]
    return settings if plain and set(settings["outputs"]) == _FIELDS else None


def output(mask: Tensor, log_probs: Tensor, entropy: Tensor, top: Tensor, items: Any) -> Any:
    """Return TRL's output for a mask (batch, T − 1) and the fields (n,) of its positions."""

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    total = mask.sum().clamp(min=1) if items is None else items
    return fused_output(
        loss=-log_probs.sum() / total,
        log_probs=spread(log_probs),
        entropy=spread(entropy),
        is_top1=spread(top),
        label_mask=mask,
    )


def sums(model: nn.Module, loss: Tensor, entropy: Tensor, top: Tensor) -> CausalLMOutputWithPast:
    """Return an output with the loss alone, and with what SFTTrainer reads where it has put its loss in chunks.

    entropy (n,) and top (n,), whether the label is on top, are those of the n labels that count.
    """
    if not has_chunked_loss(model):
        return CausalLMOutputWithPast(loss=loss)
    return ChunkedOutput(
        loss=loss,
        num_correct_tokens=top.sum(),
        entropy_sum=entropy.detach().float().sum(),
        num_valid_tokens=torch.tensor(len(top), device=top.device),
    )


def enabled(kwargs: dict[str, Any]) -> bool:
    """Whether the caller asks for the fused head at all."""
    return bool(kwargs.get("fused_lm_head"))
