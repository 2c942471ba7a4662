"""How many processes train together."""

from __future__ import annotations

from torch import distributed


def several_processes() -> bool:
    """Return whether this process is one of several of a distributed run."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
