"""transformers beyond its documented names: attention, checkpointing, losses, and the callbacks of every Trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

# What an attention function of ours hands everything to that is not packed, and the mask that goes with it.
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa_attention_forward

# The loss of causal language models: whether a model has this one decides whether ours may take its place.
from transformers.loss.loss_utils import ForCausalLMLoss as ForCausalLMLoss
from transformers.masking_utils import sdpa_mask as sdpa_mask

# GPT-2's linear layer, which stores its weight as (in, out).
from transformers.pytorch_utils import Conv1D as Conv1D

# The callback that prints logs as dictionaries; a progress bar of ours takes its place.
from transformers.trainer_callback import PrinterCallback as PrinterCallback
from transformers.utils.generic import is_flash_attention_requested

_CHECKPOINT = "_gradient_checkpointing_func"
"""Attribute of a block: the function that runs its forward under a checkpoint; the block's hooks are outside of it."""


def attention_of(config: Any) -> str:
    """Return the name of the attention function that a model's config asks for."""
    return str(config._attn_implementation)


def uses_flash_attention(config: Any) -> bool:
    """Return whether a config asks for flash attention, which reads the borders of packed rows itself."""
    return bool(is_flash_attention_requested(config=config))


def takes_attention_functions(model: Any) -> bool:
    """Return whether a model takes its attention from transformers' interface, and keeps no state of its own."""
    return bool(model._supports_attention_backend) and not getattr(model, "_is_stateful", False)


def checkpoint_function(module: nn.Module) -> Callable[..., Any] | None:
    """Return the function that checkpoints this module's forward, None where nothing does."""
    function: Callable[..., Any] | None = module.__dict__.get(_CHECKPOINT)
    return function


def set_checkpoint_function(module: nn.Module, function: Callable[..., Any]) -> None:
    """Let `function` run the module's forward: nothing else carries anything through a checkpoint."""
    setattr(module, _CHECKPOINT, function)


def is_checkpointed(module: nn.Module) -> bool:
    """Return whether this module runs its blocks under checkpoints while it trains."""
    return bool(module.__dict__.get("gradient_checkpointing", False))


def prepared_inputs(trainer: Any, batch: Any) -> dict[str, Any]:
    """Return a batch as a Trainer hands it to its model: on the right device, in the right types."""
    found: dict[str, Any] = trainer._prepare_inputs(batch)
    return found


def join_every_trainer(callback: type[Any]) -> None:
    """Let every Trainer that is made from now on have a callback of this class, TRL's trainers included.

    The list of default callbacks is public, but not documented.
    """
    # when an adapter is made, not while modules are imported: transformers may be half imported by then
    from transformers.trainer import DEFAULT_CALLBACKS

    callbacks: list[Any] = DEFAULT_CALLBACKS
    if callback not in callbacks:
        callbacks.append(callback)


def checkpoints_calls(block: nn.Module) -> bool:
    """Return whether a checkpoint goes around the whole call of a block, its hooks included.

    transformers before 5.23 has a `__call__` of its own on blocks, which runs torch's under the checkpoint; later ones
    checkpoint `forward`, which the hooks are outside of.
    """
    return type(block).__call__ is not nn.Module.__call__


def checkpointing_argument(arguments: type) -> str:
    """Return what a class of a Trainer's arguments calls checkpointing.

    transformers 5.23 renamed gradient_checkpointing; it keeps the old name until 6, with a warning.
    """
    names = {entry.name for entry in dataclasses.fields(arguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
