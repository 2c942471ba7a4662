"""Which tokens of a batch are pooled, and their sums per sequence, taken while the blocks run: no state is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.objectives.contracts import Batch

POOLS = ("prompt", "last_prompt", "answer", "all")


def pooled_tokens(batch: Batch, pool: str) -> Tensor:
    """Return (N,) which tokens are pooled.

    prompt: real tokens before the first learned one of their sequence; last_prompt: the last of those; answer: learned
    tokens; all: every real token. Prompts end at the first answer, so that in a conversation no later turn carries an
    earlier answer into the pooled state.
    """
    if pool == "all":
        return batch.real
    if pool == "answer":
        return batch.is_target & batch.real
    tokens = len(batch.sequence)
    place = torch.arange(tokens, device=batch.sequence.device)
    first = place.new_full((batch.sequences,), tokens).scatter_reduce(
        0, batch.sequence, place.where(batch.is_target, place.new_tensor(tokens)), "amin"
    )
    prompt = batch.real & (place < first[batch.sequence])
    if pool == "prompt":
        return prompt
    last = place.new_full((batch.sequences,), -1).scatter_reduce(
        0, batch.sequence, place.where(prompt, place.new_tensor(-1)), "amax"
    )
    return prompt & (place == last[batch.sequence])


@dataclass
class Pool:
    """Means of the pooled tokens per sequence, boundary by boundary."""

    tokens: Tensor
    """(k,) positions of the pooled tokens, rising."""
    counts: Tensor
    """(sequences,) how many of them each sequence has."""
    means: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch, pool: str) -> Pool:
        """Return the empty pool of a batch."""
        chosen = pooled_tokens(batch, pool).nonzero()[:, 0]
        return cls(chosen, torch.bincount(batch.sequence[chosen], minlength=batch.sequences))

    def lacks_tokens(self, batch: Batch) -> bool:
        """Tell whether there is something to predict, and in no sequence with it a token to pool."""
        counts = self.counts[batch.sequence[batch.rows]]
        return len(counts) > 0 and not bool(counts.any())

    def take(self, boundary: int, hidden: Tensor) -> None:
        """Take the mean of the hidden states (..., d) of one boundary, as constants, in float32 at least."""
        states = hidden.detach().reshape(-1, hidden.shape[-1])[self.tokens.to(hidden.device)]
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        counts = self.counts.to(hidden.device)
        sums = torch.segment_reduce(states, "sum", lengths=counts, unsafe=True)
        self.means[boundary] = sums / counts.clamp(min=1)[:, None]

    def stacked(self, boundaries: Sequence[int]) -> Tensor:
        """Return (boundaries, sequences, d) on the device of the last of them."""
        device = self.means[boundaries[-1]].device
        return torch.stack([self.means[boundary].to(device) for boundary in boundaries])

    @contextlib.contextmanager
    def collecting(self, blocks: nn.ModuleList, boundaries: Sequence[int]) -> Iterator[None]:
        """Take the states after these blocks (1 is after the first) in the forward pass within the context."""

        def hook(boundary: int) -> Any:
            def collect(block: nn.Module, args: Any, output: Any) -> None:
                self.take(boundary, output[0] if isinstance(output, tuple) else output)

            return collect

        handles = [blocks[boundary - 1].register_forward_hook(hook(boundary)) for boundary in boundaries]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
