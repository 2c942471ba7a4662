"""Keeps closed ranks where they are while an optimizer steps, and stops steps that nobody allocates for.

A closed rank has no gradient, but decay and momentum would move it all the same. A site that is off altogether is
taken out of the step, with whatever else it trains (a magnitude); of the others the closed rows of A and columns of B
are put back after it. A site that comes back starts with an empty state in the optimizer. A rank that opens beside
others shares their number of steps, so nothing would correct the bias of moments at 0: its first moment starts at 0,
its second one at the mean of those of its neighbors.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.adapters.contracts import SiteAdapter
from loraplex.compat.torch import version_of
from loraplex.errors import UserError
from loraplex.training_hooks.contracts import TrainingHook, held_by
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.model import LoraplexTuner

_FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")
"""What optimizers of torch's kind call their states. Others, 8-bit codes for one, are left as they are."""


class _Seen:
    """What was last known of a gate, so that nothing is read from the device while it stays."""

    def __init__(self, gate: Tensor) -> None:
        self.gate, self.version = gate, version_of(gate)
        self.open = gate.detach().bool().cpu()
        closed = (~self.open).nonzero().flatten()
        self.off = len(closed) == len(gate)
        self.closed = None if self.off or not len(closed) else closed.to(gate.device)


_Trained = list[tuple[nn.Parameter, int | None]]
"""What of a site is trained, with the dimension of its ranks where it has one."""
_Kept = list[tuple[Tensor, int, Tensor, Tensor]]
"""(parameter, the dimension of its ranks, the indices of the closed ones, their values) during a step."""


class ClosedRanks(TrainingHook):
    """Keeps closed ranks where they are, and stops steps that nobody allocates for."""

    def __init__(self) -> None:
        self._seen: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.WeakKeyDictionary[SiteAdapter, _Seen]] = (
            weakref.WeakKeyDictionary()
        )
        # by optimizer: one may step inside the step of another
        self._kept: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Kept] = weakref.WeakKeyDictionary()

    def concerns(self, tuner: LoraplexTuner) -> bool:
        """Return whether ranks of the tuner's adapters may close."""
        return any(_moves(config) for config in tuner.peft_config.values())

    def before_step(self, optimizer: torch.optim.Optimizer, tuners: Sequence[LoraplexTuner]) -> None:
        """Keep the values of closed ranks, and take sites that are off out of the step.

        Raises:
            UserError: when the optimizer holds an adapter with an allocation that nobody drives.
        """
        kept: _Kept = []
        held = held_by(optimizer)
        for tuner in tuners:
            for adapter in _driven(tuner):
                if tensors := _trained(adapter, held):
                    kept += _keep_still(tensors, self._known(optimizer, adapter, tensors))
            for name in tuner.active_adapters:
                config = tuner.config_of(name)
                if config is not None and _moves(config) and not config.state.driven and _holds(held, tuner, name):
                    raise UserError(
                        f"adapter '{name}' has an allocation that nobody drives: a Trainer does so by itself when it "
                        "is made after the adapter; in a loop of your own call loraplex.start_allocation before the "
                        "first one"
                    )
        self._kept[optimizer] = kept

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, tuners: Sequence[LoraplexTuner]) -> None:
        """Put the values of closed ranks back."""
        for parameter, dim, closed, before in self._kept.pop(optimizer, []):
            parameter.index_copy_(dim, closed, before)

    def start_opened(self, optimizer: torch.optim.Optimizer, tuner: LoraplexTuner) -> None:
        """Give ranks that have opened since the last step their state in the optimizer.

        To be called before a checkpoint is written; otherwise the next step does it.
        """
        held = held_by(optimizer)
        for adapter in _driven(tuner):
            if tensors := _trained(adapter, held):
                self._known(optimizer, adapter, tensors)

    def _known(self, optimizer: torch.optim.Optimizer, adapter: SiteAdapter, tensors: _Trained) -> _Seen:
        """Return what is known of a site's gate now; where it has changed, bring the optimizer's state up to it."""
        known = self._seen.setdefault(optimizer, weakref.WeakKeyDictionary())
        seen, gate = known.get(adapter), adapter.factors.gate
        if seen is None or seen.gate is not gate or seen.version != version_of(gate):
            now = _Seen(gate)
            if seen is not None and bool((opened := now.open & ~seen.open).any()):
                for parameter, dim in tensors:
                    if seen.off:
                        optimizer.state.pop(parameter, None)
                    elif dim is not None:
                        _start_moments(optimizer.state.get(parameter, {}), dim, opened, seen.open)
            known[adapter] = seen = now
        return seen


def _moves(config: Any) -> bool:
    """Whether the ranks of an adapter with this config may still move."""
    assert isinstance(config, AdapterConfig)
    return config.state.finished_ranks is None and config.allocation.moves_ranks


def _holds(held: set[int], tuner: LoraplexTuner, name: str) -> bool:
    layers = tuner.adapter_layers(name)
    return any(id(p) in held for layer in layers for p, _ in layer.adapter(name).factors.rank_parameters())


def _driven(tuner: LoraplexTuner) -> Iterator[SiteAdapter]:
    """Yield the adapters of the sites whose allocation is under way."""
    for name, config in tuner.peft_config.items():
        assert isinstance(config, AdapterConfig)
        if config.state.driven:
            yield from (layer.adapter(name) for layer in tuner.adapter_layers(name))


def _trained(adapter: SiteAdapter, held: set[int]) -> _Trained:
    """Return what of a site is among the `held` parameters."""
    own = [*adapter.factors.rank_parameters(), *((parameter, None) for parameter in adapter.combine.parameters())]
    return [(parameter, dim) for parameter, dim in own if id(parameter) in held]


@torch.no_grad()
def _keep_still(tensors: _Trained, seen: _Seen) -> _Kept:
    """Return what has to be put back after the step; a site that is off loses its gradients instead."""
    kept: _Kept = []
    if seen.off:
        for parameter, _ in tensors:
            parameter.grad = None
    elif seen.closed is not None:
        for parameter, dim in tensors:
            if dim is not None:
                closed = seen.closed.to(parameter.device)
                kept.append((parameter, dim, closed, parameter.detach().index_select(dim, closed)))
    return kept


@torch.no_grad()
def _start_moments(state: dict[str, Any], dim: int, opened: Tensor, open_before: Tensor) -> None:
    for name in (*_FIRST_MOMENTS, *_SECOND_MOMENTS):
        moment = state.get(name)
        if isinstance(moment, Tensor) and moment.is_floating_point() and moment.dim() > dim:
            ranks, others = (mask.nonzero().flatten().to(moment.device) for mask in (opened, open_before))
            start = moment.index_select(dim, others).mean(dim, keepdim=True)
            if name in _FIRST_MOMENTS:
                start.zero_()
            moment.index_copy_(dim, ranks, start.repeat_interleave(len(ranks), dim))
