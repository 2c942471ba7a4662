"""transformers beyond its documented names: checkpointing, and its name among a Trainer's arguments."""

from __future__ import annotations

import dataclasses

from torch import nn


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
