"""A record of gates: how much every head of a site was used, kept as sums on the device until somebody reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DEAD = 0.1
"""A head is dead when its mean gate is below this share of an even one, 1/heads."""


@dataclass(frozen=True)
class GateSummary:
    """What the gates of one site were over `tokens` positions."""

    tokens: int
    load: tuple[float, ...]
    """Mean gate of every head; the sum is 1."""
    entropy: float
    """Mean over the positions of −Σ g log g / log(heads): 1 when the heads share evenly, 0 when one takes all."""

    @property
    def dead(self) -> float:
        """Share of heads whose mean gate is below a tenth of an even one."""
        return sum(value * len(self.load) < _DEAD for value in self.load) / len(self.load)


class GateRecord:
    """Sums over the gates of one site; off until `on` is set, since only some who run a model want to know.

    Recomputation under gradient checkpointing counts its positions again, which leaves the means as they are.
    """

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.on = False
        self.clear()

    def clear(self) -> None:
        """Forget what was added."""
        self._tokens = 0
        self._sums: Tensor | None = None

    def add(self, gates: Tensor) -> None:
        """Add gates (..., heads); nothing is waited for on an accelerator."""
        gates = gates.detach().reshape(-1, self.heads)
        entropy = -torch.special.xlogy(gates, gates).sum()
        sums = torch.cat([gates.sum(0), entropy[None]]).to(torch.promote_types(gates.dtype, torch.float32))
        # not in place: some who record run in inference mode, others do not
        self._sums = sums if self._sums is None else self._sums.to(sums) + sums
        self._tokens += len(gates)

    def read(self) -> GateSummary | None:
        """Return what was added since `clear`, None where nothing was."""
        if self._sums is None or not self._tokens:
            return None
        *load, entropy = (self._sums.double() / self._tokens).tolist()
        even = torch.tensor(float(self.heads)).log().item()
        return GateSummary(self._tokens, tuple(load), entropy / even if self.heads > 1 else 1.0)
