"""A second forward pass that computes stretches of some sequences only, and looks back at the first pass for the rest.

Exact where nothing is drawn and nothing is recomputed: a causal model's states before the stretches are those of the
first pass, and so are the keys and values, whose gradients go through the first pass's graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.batch_loss.packing import unsupported
from loraplex.compat.transformers import attention_of, is_checkpointed
from loraplex.kernels.packed_attention import PACKED_ATTENTION, KeyMemory
from loraplex.objectives.contracts import SecondPass


def can_look_back(model: nn.Module) -> bool:
    """Tell whether a second pass of this model, in training, may take keys and values from the first.

    Whether the first pass draws random numbers, which a second one would not repeat, is seen while it runs: here only
    dropout that is sure to draw is looked for, so that nothing is kept in vain.
    """
    if not isinstance(model, PreTrainedModel) or unsupported(model) is not None:
        return False
    if attention_of(model.config.get_text_config()) not in ("sdpa", PACKED_ATTENTION):
        return False
    return not any(
        (isinstance(module, nn.Dropout) and module.p > 0) or is_checkpointed(module) for module in model.modules()
    )


def layers_of(backbone: nn.Module) -> int:
    """Return how many attention modules look at keys and values in a forward pass: one a layer."""
    return int(backbone.config.get_text_config().num_hidden_layers)  # type: ignore[operator, union-attr]


def looking_back(
    backbone: nn.Module, inputs: dict[str, Any], memory: KeyMemory, sequence: Tensor, rows: Tensor, chosen: Tensor
) -> SecondPass:
    """Return the second pass over every sequence that has one of `rows`, from the first to the last of them.

    `inputs` are those of the first pass, packed, `sequence` (N,) its tokens' sequences, rising, `rows` (k,) positions
    in it, `memory` what it kept.
    """
    place = torch.arange(len(sequence), device=sequence.device)
    owners, counts = torch.unique_consecutive(sequence[rows], return_counts=True)
    ends = counts.cumsum(0)
    first, last = rows[ends - counts], rows[ends - 1]
    starts = torch.searchsorted(sequence, owners)
    # -1: the token's sequence has no row
    slot = torch.full((int(sequence[-1]) + 1,), -1, device=sequence.device).index_put(
        (owners,), torch.arange(len(owners), device=sequence.device)
    )[sequence]
    visible = (slot >= 0) & (place <= last[slot])
    stretch = visible & (place >= first[slot])
    tokens = stretch.nonzero()[:, 0]
    lengths, seen = last - first + 1, last - starts + 1
    memory.look_back(visible.nonzero()[:, 0], (visible.cumsum(0) - 1)[tokens])
    again = {
        "input_ids": inputs["input_ids"][:, tokens],
        "position_ids": inputs["position_ids"][:, tokens],
        "cu_seq_lens_q": _borders(lengths),
        "cu_seq_lens_k": _borders(seen),
        "max_length_q": int(lengths.max()),
        "max_length_k": int(seen.max()),
        "key_memory": memory,
        "use_cache": False,
    }
    within = torch.searchsorted(tokens, rows)

    def hidden() -> Tensor:
        states: Tensor = backbone(**again).last_hidden_state
        return states[0, within.to(states.device)]

    return SecondPass(len(tokens), within, chosen, hidden)


def _borders(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
