"""Random numbers that depend on a seed and on what they are drawn for, and on nothing else."""

from __future__ import annotations

import hashlib

import torch


def seeded(seed: int, *what: object) -> torch.Generator:
    """Return a CPU generator for (seed, what): the same in every process, in whatever order others are drawn."""
    digest = hashlib.sha256(":".join(map(str, (seed, *what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
