"""Attention over sequences laid end to end, never across a border and without work across borders.

Registered with transformers under `PACKED_ATTENTION`, with a mask function, so every causal model that uses the
attention interface takes it unpatched. Whatever is not packed (a padded batch, a cache, an encoder) goes to SDPA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from loraplex.compat.transformers import sdpa_attention_forward, sdpa_mask
from loraplex.errors import UserError
from loraplex.kernels.sequence_attention import LONGEST, sequence_attention

PACKED_ATTENTION = "loraplex_packed"
"""Name for `attn_implementation=`."""


class KeyMemory:
    """Keys and values of a forward pass over packed sequences, for another one over a stretch of some of them.

    Given to a backbone as `key_memory`. The first pass puts its keys and values in; after `look_back` a second one over
    stretches of tokens attends to what came before them in the first, with the gradients that belong there.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._twice = False
        self._visible: Tensor | None = None
        self._stretch: Tensor | None = None

    @property
    def filled_once(self) -> int:
        """How many attention modules have put their keys and values in; 0 where one has done so twice."""
        return 0 if self._twice else len(self._kept)

    def look_back(self, visible: Tensor, stretch: Tensor) -> None:
        """Prepare the second pass: the tokens it sees (k,), and where among those the ones are that it computes."""
        self._visible, self._stretch = visible, stretch

    def join(self, module: torch.nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values (1, heads, tokens, d) that this attention module has to look at."""
        if self._visible is None or self._stretch is None:
            self._twice = self._twice or id(module) in self._kept
            self._kept[id(module)] = (key, value)
            return key, value
        visible, stretch = self._visible.to(key.device), self._stretch.to(key.device)
        old_key, old_value = (tensor.index_select(2, visible) for tensor in self._kept[id(module)])
        return old_key.index_copy(2, stretch, key), old_value.index_copy(2, stretch, value)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention output (batch, T, heads, d) and no weights, as transformers' attention functions do.

    query (batch, heads, T, d), key and value (batch, key heads, T', d). The borders of packed sequences are read from
    `cu_seq_lens_q`, or from `position_ids` that start again. `sequence_masks`, where given, has a boolean mask (t, t)
    for every packed sequence, true where a query (row) sees a key; it takes the place of the causal one. `key_memory`
    is a `KeyMemory`.

    Raises:
        UserError: for what it does not know how to compute: softcapped logits, attention sinks, and over packed
            sequences a position bias or a sliding window that is shorter than the longest of them.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UserError(
                f"{type(module).__name__} uses {name}, which packed attention does not compute: "
                "turn padding_free off, or choose an attention implementation that has it"
            )
    memory: KeyMemory | None = kwargs.pop("key_memory", None)
    if memory is not None:
        key, value = memory.join(module, key, value)
        if query.shape[2] != key.shape[2]:
            return _stretches(query, key, value, scaling, kwargs), None
    lengths = None if attention_mask is not None else _lengths(query, key, kwargs)
    if lengths is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return output, None
    _refuse(module, max(lengths), kwargs)
    masks: Sequence[Tensor | None] | None = kwargs.get("sequence_masks")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if masks is None and causal and not dropout and query.device.type == "cpu" and max(lengths) <= LONGEST:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return sequence_attention(query, key, value, lengths, scale), None
    # split, not slices: the backward pass of a split is one concatenation, that of every slice a full tensor of zeros
    grouped = query.shape[1] != key.shape[1]
    split = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    parts = [
        F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scaling, enable_gqa=grouped
        )
        for (q, k, v), mask in zip(split, masks or [None] * len(lengths), strict=True)
    ]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1), None


def _stretches(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, kwargs: dict[str, Any]) -> Tensor:
    """Return (1, T, heads, d) for queries that are the last ones of their sequences of keys."""
    lengths = [kwargs[name].diff().tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    _refuse(torch.nn.Module(), max(lengths[1]), kwargs)
    grouped = query.shape[1] != key.shape[1]
    split = zip(query.split(lengths[0], 2), key.split(lengths[1], 2), value.split(lengths[1], 2), strict=True)
    parts = []
    for q, k, v in split:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        parts.append(F.scaled_dot_product_attention(q, k, v, seen, scale=scaling, enable_gqa=grouped))
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1)


def _lengths(query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> list[int] | None:
    """Return the lengths of the packed sequences, None when there is at most one sequence per row."""
    if query.shape[2] != key.shape[2]:
        return None
    borders = kwargs.get("cu_seq_lens_q")
    if borders is None:
        positions = kwargs.get("position_ids")
        if positions is None or positions.ndim != 2 or positions.shape[-1] != query.shape[2]:
            return None
        restarts = positions[:, 1:] != positions[:, :-1] + 1
        if not restarts.any():
            return None
        if len(positions) > 1:
            raise UserError("packed sequences must lie in one row: a batch of several rows has positions that restart")
        starts = (restarts[0].nonzero().flatten() + 1).tolist()
        ends = [*starts, query.shape[2]]
        return [end - start for start, end in zip([0, *starts], ends, strict=True)]
    lengths: list[int] = borders.diff().tolist()
    several = len(lengths) > 1 or kwargs.get("sequence_masks") is not None
    return lengths if several and query.shape[0] == 1 else None


def _refuse(module: torch.nn.Module, longest: int, kwargs: dict[str, Any]) -> None:
    window = kwargs.get("sliding_window")
    if window is not None and window < longest:
        raise UserError(
            f"{type(module).__name__} has a sliding window of {window}, shorter than a packed sequence of {longest}: "
            "turn padding_free off"
        )
    if kwargs.get("position_bias") is not None:
        raise UserError(f"{type(module).__name__} has a position bias: turn padding_free off")


def _packed_mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Return no mask where `packed_attention` finds the borders itself, SDPA's mask otherwise."""
    special = kwargs.get("local_size") is not None or kwargs.get("use_vmap", False)
    if attention_mask is None and not special and kwargs["q_length"] == kwargs["kv_length"]:
        return None
    return sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _packed_mask)
