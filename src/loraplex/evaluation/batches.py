"""How evaluation runs a model: items of like length together, and the model in evaluation mode meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from loraplex.models.modes import evaluation_mode


def length_batches(lengths: Sequence[int], batch_size: int, most_tokens: int | None = None) -> Iterator[list[int]]:
    """Yield the indices of all items in batches, longest first, so that memory runs out at once or not at all.

    A batch has at most `batch_size` items and, padded to its longest, at most `most_tokens` tokens; an item longer
    than that is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        is_full = len(batch) == batch_size
        if batch and most_tokens is not None:
            is_full |= (len(batch) + 1) * lengths[batch[0]] > most_tokens
        if is_full:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode without gradients inside the block; every module gets its own mode back."""
    # Not inference_mode: what a model keeps from one forward to the next has to serve training again.
    with evaluation_mode(model), torch.no_grad():
        yield
