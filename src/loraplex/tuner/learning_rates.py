"""Learning rates of their own for some parameters (LoRA+), whatever optimizer a trainer builds.

Trainers form the groups of the optimizer themselves and give one rate to all that an adapter trains. So while an
optimizer steps, its groups are split by ratio, and put back when it has stepped: schedulers, checkpoints and everybody
who looks at the groups see those that the trainer made.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_OWN = "_loraplex_own_groups"
"""Attribute of an optimizer that is stepping: the groups that its maker gave it."""
_PER_PARAMETER = ("params", "param_names")


class Rated(Protocol):
    """A tuner, as far as this module knows it."""

    def learning_rate_ratios(self) -> Iterable[tuple[nn.Parameter, float]]:
        """Yield the parameters that learn at another rate than the others, with the ratio."""


_tuners: weakref.WeakSet[Any] = weakref.WeakSet()
_installed: list[Any] = []


def watch(tuner: Rated) -> None:
    """From now on every optimizer that holds parameters of `tuner` keeps to its ratios, if it has any."""
    if any(True for _ in tuner.learning_rate_ratios()):
        _install()
        _tuners.add(tuner)


def _install() -> None:
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_pre_hook))
        _installed.append(register_optimizer_step_post_hook(_post_hook))
        _check_under_trainers()


def _pre_hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # still there when a step has failed
    _put_back(optimizer)
    ratios = {id(parameter): ratio for tuner in _tuners for parameter, ratio in tuner.learning_rate_ratios()}
    groups = optimizer.param_groups
    if ratios and any(id(parameter) in ratios for group in groups for parameter in group["params"]):
        setattr(optimizer, _OWN, [(group, _split(group, ratios)) for group in groups])
        optimizer.param_groups = [part for _, parts in getattr(optimizer, _OWN) for part in parts]


def _split(group: dict[str, Any], ratios: Mapping[int, float]) -> list[dict[str, Any]]:
    """Return the group in parts of one ratio each, the rate multiplied with it."""
    found = [ratios.get(id(parameter), 1.0) for parameter in group["params"]]
    parts = []
    for ratio in dict.fromkeys(found):
        chosen = [index for index, other in enumerate(found) if other == ratio]
        lists = {key: [group[key][index] for index in chosen] for key in _PER_PARAMETER if key in group}
        parts.append({**group, **lists, "lr": group["lr"] * ratio})
    return parts or [group]


def _post_hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    _put_back(optimizer)


def _put_back(optimizer: torch.optim.Optimizer) -> None:
    own = optimizer.__dict__.pop(_OWN, None)
    if own is None:
        return
    for group, parts in own:
        # what an optimizer counts in its groups
        group.update({key: value for key, value in parts[0].items() if key not in (*_PER_PARAMETER, "lr")})
    optimizer.param_groups = [group for group, _ in own]


def _check_under_trainers() -> None:
    """Let every Trainer that is made from now on check its optimizer."""
    # not above: transformers may be half imported when PEFT imports the tuner
    from transformers.trainer import DEFAULT_CALLBACKS

    from loraplex.tuner.rate_check import RateCheck

    callbacks: list[Any] = DEFAULT_CALLBACKS
    if RateCheck not in callbacks:
        callbacks.append(RateCheck)
