"""Learning rates and weight decay of their own for some parameters (LoRA+), whatever optimizer a trainer builds.

Trainers form the groups of the optimizer themselves and give one rate to all that an adapter trains. So while an
optimizer steps, its groups are split by rate, and put back when it has stepped: schedulers, checkpoints and everybody
who looks at the groups see those that the trainer made. A rate that is given as a number is that of the peak: it moves
with the schedule of its group, which is lr / initial_lr (torch's schedulers write the latter).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from loraplex.adapters.contracts import Rate
from loraplex.tuner import every_trainer

_OWN = "_loraplex_own_groups"
"""Attribute of an optimizer that is stepping: the groups that its maker gave it."""
_PER_PARAMETER = ("params", "param_names")
_OF_A_PART = (*_PER_PARAMETER, "lr", "weight_decay")
_COMMON = Rate()


class Rated(Protocol):
    """A tuner, as far as this module knows it."""

    def rates(self) -> Iterable[tuple[nn.Parameter, Rate]]:
        """Yield the parameters that learn otherwise than the others."""


_tuners: weakref.WeakSet[Any] = weakref.WeakSet()
_installed: list[Any] = []


def watch(tuner: Rated) -> None:
    """From now on every optimizer that holds parameters of `tuner` keeps to its rates, if it has any."""
    if any(True for _ in tuner.rates()):
        _install()
        _tuners.add(tuner)


def _install() -> None:
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_pre_hook))
        _installed.append(register_optimizer_step_post_hook(_post_hook))
        from loraplex.tuner.rate_check import RateCheck

        every_trainer.join(RateCheck)


def _pre_hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # still there when a step has failed
    _put_back(optimizer)
    rates = {id(parameter): rate for tuner in _tuners for parameter, rate in tuner.rates()}
    groups = optimizer.param_groups
    if rates and any(id(parameter) in rates for group in groups for parameter in group["params"]):
        setattr(optimizer, _OWN, [(group, _split(group, rates)) for group in groups])
        optimizer.param_groups = [part for _, parts in getattr(optimizer, _OWN) for part in parts]


def _split(group: dict[str, Any], rates: Mapping[int, Rate]) -> list[dict[str, Any]]:
    """Return the group in parts that learn alike."""
    found = [rates.get(id(parameter), _COMMON) for parameter in group["params"]]
    parts = []
    for rate in dict.fromkeys(found):
        chosen = [index for index, other in enumerate(found) if other == rate]
        lists = {key: [group[key][index] for index in chosen] for key in _PER_PARAMETER if key in group}
        parts.append({**group, **lists, **_settings(group, rate)})
    return parts or [group]


def _settings(group: dict[str, Any], rate: Rate) -> dict[str, Any]:
    """Return what a part of the group has in place of the group's own settings."""
    lr, settings = group["lr"], {}
    if rate.peak is None:
        settings["lr"] = lr * rate.ratio
    else:
        initial = group.get("initial_lr", lr)
        settings["lr"] = rate.peak * (lr / initial) if initial else initial
    if not rate.decays and "weight_decay" in group:
        settings["weight_decay"] = 0.0
    return settings


def _post_hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    _put_back(optimizer)


def _put_back(optimizer: torch.optim.Optimizer) -> None:
    own = optimizer.__dict__.pop(_OWN, None)
    if own is None:
        return
    for group, parts in own:
        # what an optimizer counts in its groups
        group.update({key: value for key, value in parts[0].items() if key not in _OF_A_PART})
    optimizer.param_groups = [group for group, _ in own]
