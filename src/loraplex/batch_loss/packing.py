"""Takes the padding out of a batch before the backbone sees it: rows laid end to end, positions restarting."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.compat.transformers import attention_of, takes_attention_functions, uses_flash_attention
from loraplex.errors import UserError
from loraplex.kernels.packed_attention import PACKED_ATTENTION

_ABSENT = frozenset({"inputs_embeds", "position_ids", "output_attentions", "output_hidden_states"})
"""Arguments of a backbone that must be absent, None or False in a batch that is packed."""
_UNDERSTOOD = _ABSENT | {"input_ids", "attention_mask", "use_cache", "return_dict"}


_ATTENTION_BEFORE: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""Models whose attention was switched to packed rows, and what it was before."""


@dataclass(frozen=True)
class Packed:
    """A batch without padding."""

    inputs: dict[str, Any]
    """Arguments of the backbone; its last hidden state is (1, tokens, d)."""
    place: Tensor
    """(batch, T) index of every real token in the row of tokens."""


def unsupported(model: nn.Module) -> str | None:
    """Return why the rows of a batch cannot be packed for this model, None when they can."""
    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is not a transformers model"
    config = model.config.get_text_config()
    if not takes_attention_functions(model):
        return f"{config.model_type} does not take its attention from transformers' attention interface"
    if attention_of(config) not in ("sdpa", PACKED_ATTENTION) and not _is_flash(model):
        return f"attn_implementation is '{attention_of(config)}', packing needs 'sdpa' or flash attention"
    if getattr(config, "is_encoder_decoder", False) or not model.can_generate():
        return f"{config.model_type} is not a causal language model"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return f"{config.model_type} has layers other than full attention ({', '.join(sorted(kinds))})"
    for name in ("attn_logit_softcapping", "num_local_experts", "num_experts"):
        if getattr(config, name, None):
            return f"{config.model_type} uses {name}"
    return None


def pack(
    model: nn.Module, inputs: dict[str, Any], learned: Tensor, wanted: bool | str, *, always: bool = False
) -> Packed | None:
    """Return the batch without padding, None where there is none to take out or the batch must stay as it is.

    With `always`, a batch that has no padding is laid out in one row too. `learned` (batch, T) tells which tokens are
    labels: a row whose padding is learned stays as it is, with the loss that the base model has there.
    `inputs` are the keyword arguments of the backbone, `wanted` is True, False or 'auto'. A model on SDPA is switched
    to `PACKED_ATTENTION` once, which is SDPA for everything that is not packed; flash attention reads the borders
    itself and stays.

    Raises:
        UserError: when `wanted` is True and the model cannot do it.
    """
    mask = inputs.get("attention_mask")
    if wanted is False or not isinstance(mask, Tensor) or mask.ndim != 2 or inputs.get("input_ids") is None:
        return None
    if any(inputs.get(name) not in (None, False) for name in _ABSENT) or not inputs.keys() <= _UNDERSTOOD:
        return None
    if bool(mask.all()) and not always:
        return None
    reason = unsupported(model)
    if reason is None and not bool((mask[:, 1:] <= mask[:, :-1]).all()):
        reason = "the batch is padded on the left"
    if reason is None and bool((learned.to(mask.device) & (mask == 0)).any()):
        reason = "labels other than -100 stand on padding"
    if reason is not None:
        if wanted is True:
            raise UserError(f"padding_free is on, but {reason}: set it to 'auto' or False")
        return None
    assert isinstance(model, PreTrainedModel)
    if attention_of(model.config) != PACKED_ATTENTION and not _is_flash(model):
        _ATTENTION_BEFORE[model] = attention_of(model.config)
        model.set_attn_implementation(PACKED_ATTENTION)
    return _lay_out(inputs["input_ids"], mask.bool())


def restore_attention(model: nn.Module) -> None:
    """Give a model its attention back where `pack` has switched it, unless somebody has chosen another one since."""
    before = _ATTENTION_BEFORE.pop(model, None)
    if before is not None and isinstance(model, PreTrainedModel) and attention_of(model.config) == PACKED_ATTENTION:
        model.set_attn_implementation(before)


def _is_flash(model: PreTrainedModel) -> bool:
    return uses_flash_attention(model.config.get_text_config())


def _lay_out(ids: Tensor, mask: Tensor) -> Packed:
    lengths = mask.sum(1)
    borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    place = borders[:-1, None].long() + torch.arange(mask.shape[1], device=mask.device)
    inputs = {
        "input_ids": ids[mask][None],
        "position_ids": torch.arange(mask.shape[1], device=mask.device).expand_as(mask)[mask][None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return Packed(inputs, place)
