"""transformers beyond its documented names: checkpointing."""

from __future__ import annotations

from torch import nn


def checkpoints_calls(block: nn.Module) -> bool:
    """Return whether a checkpoint goes around the whole call of a block, its hooks included.

    transformers before 5.23 has a `__call__` of its own on blocks, which runs torch's under the checkpoint; later ones
    checkpoint `forward`, which the hooks are outside of.
    """
    return type(block).__call__ is not nn.Module.__call__
