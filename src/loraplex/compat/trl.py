"""TRL beyond its top-level names: the heads that its trainers put on a model, and what they read of the output.

From 1.16 on that is a fused head, asked for by `fused_lm_head=True`. Before, SFTTrainer put a loss in chunks in the
place of the model's forward, and asked for nothing.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

_SETTINGS = {"temperature", "outputs", "cast_lm_head_to_fp32", "logit_scale", "final_logit_softcapping"} | {
    "backbone_attr",
    "text_config",
}
"""What the function keeps that TRL puts in the place of a model's forward."""


def fused_head_settings(model: nn.Module) -> dict[str, Any] | None:
    """Return the settings of the fused head that a trainer of TRL has put on a model, None where there is none.

    TRL keeps them in the closure of the model's forward and nowhere else.
    """
    function = getattr(model.forward, "__func__", None)
    if not inspect.isfunction(function):
        return None
    settings = dict(inspect.getclosurevars(function).nonlocals)
    return settings if settings.keys() >= _SETTINGS else None


def fused_output(**fields: Tensor) -> Any:
    """Return the output that TRL's trainers read of a fused head: loss, log_probs, entropy, is_top1 and label_mask."""
    from trl.trainer.utils import FusedCausalLMOutput

    return FusedCausalLMOutput(**fields)


@dataclass
class ChunkedOutput(CausalLMOutputWithPast):
    """What SFTTrainer reads of a model that has its loss in chunks: the loss, and sums over the labels that count."""

    num_correct_tokens: Tensor | None = None
    entropy_sum: Tensor | None = None
    num_valid_tokens: Tensor | None = None
    aux_loss: Tensor | None = None


def has_chunked_loss(model: nn.Module) -> bool:
    """Return whether SFTTrainer, before 1.16, has put its loss in chunks on a model: it then reads `ChunkedOutput`."""
    return getattr(getattr(model.forward, "__func__", None), "__name__", "") == "_chunked_ce_forward"


def put_fused_head(model: nn.Module, **settings: Any) -> None:
    """Put TRL's fused head on a model as SFTTrainer does: to measure a step without a trainer."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(cast(Any, model), **settings)
