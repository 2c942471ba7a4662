"""Singular vectors of a frozen weight, computed once per weight and kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from functools import partial

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex.cache import cache_dir, cache_enabled
from loraplex.files import write_atomically
from loraplex.kernels.truncated_svd import truncated_svd

_WORTH_KEEPING = 1 << 18
"""Elements of a weight from which reading the decomposition is quicker than computing it."""
_FOLDER = "singular-vectors-1"
"""In the cache; the number goes up when the decomposition changes."""
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Bases:
    """W0 ≈ U diag(S) Vᵀ, float32, on the CPU or the device of the weight."""

    u: Tensor
    """(out, r)"""
    s: Tensor
    """(r,)"""
    vh: Tensor
    """(r, in)"""
    digest: bytes
    """Of the shape and the numbers of W0, 16 bytes."""


def singular_bases(weight: Tensor, rank: int, *, exact: bool = False) -> Bases:
    """Return the `rank` leading singular vectors of `weight` (out, in), see `truncated_svd`."""
    digest = weight_digest(weight)
    file = cache_dir() / _FOLDER / f"{digest.hex()}-{'exact' if exact else 'randomized'}-{rank}.safetensors"
    if weight.numel() < _WORTH_KEEPING or not cache_enabled():
        return _compute(weight, rank, exact, digest)
    # an unreadable file costs time only: it is made again
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        found = load_file(file)
        return Bases(found["u"], found["s"], found["vh"], digest)
    bases = _compute(weight, rank, exact, digest)
    # a cache that cannot be written costs time only
    with contextlib.suppress(OSError):
        tensors = {"u": bases.u.cpu(), "s": bases.s.cpu(), "vh": bases.vh.cpu()}
        write_atomically(file, partial(save_file, tensors), durable=False)
    return bases


def weight_digest(weight: Tensor) -> bytes:
    """Return 16 bytes that identify the shape and the numbers of `weight`, whichever type holds them exactly."""
    hashed = hashlib.blake2b(str(tuple(weight.shape)).encode(), digest_size=16)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    for rows in weight.detach().split(_ROWS_AT_ONCE):
        # bfloat16 and the float32 it was widened to are the same weight
        hashed.update(rows.to("cpu", dtype).contiguous().numpy().data)
    return hashed.digest()


def _compute(weight: Tensor, rank: int, exact: bool, digest: bytes) -> Bases:
    u, s, vh = (part.float().contiguous() for part in truncated_svd(weight, rank, exact=exact))
    return Bases(u, s, vh, digest)
