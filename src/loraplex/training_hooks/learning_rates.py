"""Learning rates and weight decay of their own for some parameters (LoRA+), whatever optimizer a trainer builds.

Trainers form the groups of the optimizer themselves and give one rate to all that an adapter trains. So while an
optimizer steps, its groups are split by rate, and put back when it has stepped: schedulers, checkpoints and everybody
who looks at the groups see those that the trainer made. A rate that is given as a number is that of the peak: it moves
with the schedule of its group, which is lr / initial_lr (torch's schedulers write the latter).

Some optimizers keep numbers in their groups that follow from the rate (schedule-free ones sum weights). Every part has
its own; between steps they lie in the group, under `PARTS`, so that checkpoints carry them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from loraplex.adapters.contracts import Rate
from loraplex.compat.accelerate import unwrapped
from loraplex.errors import UserError
from loraplex.training_hooks.contracts import TrainingHook, held_by
from loraplex.tuner.model import LoraplexTuner, tuners_in

_OWN = "_loraplex_own_groups"
"""Attribute of an optimizer that is stepping: the groups that its maker gave it, each with its parts."""
PARTS = "loraplex_parts"
"""Key of a group: what each of its parts but the first keeps of its own, in the order of the parts."""
_PER_PARAMETER = ("params", "param_names")
_OF_A_PART = (*_PER_PARAMETER, "lr", "weight_decay")
_COMMON = Rate()


class LearningRates(TrainingHook):
    """Lets every optimizer that holds parameters with rates of their own keep to them."""

    def concerns(self, tuner: LoraplexTuner) -> bool:
        """Return whether a parameter of the tuner has a rate of its own."""
        return any(True for _ in tuner.rates())

    def before_step(self, optimizer: torch.optim.Optimizer, tuners: Sequence[LoraplexTuner]) -> None:
        """Split the optimizer's groups by rate."""
        # still there when a step has failed
        _put_back(optimizer)
        rates = {id(parameter): rate for tuner in tuners for parameter, rate in tuner.rates()}
        groups = optimizer.param_groups
        if rates and any(id(parameter) in rates for group in groups for parameter in group["params"]):
            setattr(optimizer, _OWN, [(group, _split(group, rates)) for group in groups])
            optimizer.param_groups = [part for _, parts in getattr(optimizer, _OWN) for part in parts]

    def after_step(self, optimizer: torch.optim.Optimizer, tuners: Sequence[LoraplexTuner]) -> None:
        """Put the groups back."""
        _put_back(optimizer)

    def in_trainer(self) -> TrainerCallback:
        """Return the check that the Trainer's optimizer can keep to the rates."""
        return _RateCheck()


def _split(group: dict[str, Any], rates: Mapping[int, Rate]) -> list[dict[str, Any]]:
    """Return the group in parts that learn alike, each with what it has kept of its own."""
    found = [rates.get(id(parameter), _COMMON) for parameter in group["params"]]
    parts: list[dict[str, Any]] = []
    for rate in dict.fromkeys(found):
        chosen = [index for index, other in enumerate(found) if other == rate]
        lists = {key: [group[key][index] for index in chosen] for key in _PER_PARAMETER if key in group}
        others = group.get(PARTS, ())
        kept = others[len(parts) - 1] if 0 < len(parts) <= len(others) else {}
        parts.append({**group, **kept, **lists, **_settings(group, rate)})
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


def _put_back(optimizer: torch.optim.Optimizer) -> None:
    own = optimizer.__dict__.pop(_OWN, None)
    if own is None:
        return
    for group, parts in own:
        # what an optimizer counts in its groups: the first part's is the group's
        group.update(_counted(parts[0]))
        others = [
            {key: value for key, value in _counted(part).items() if not _same(value, group.get(key))}
            for part in parts[1:]
        ]
        if any(others):
            group[PARTS] = others
        else:
            group.pop(PARTS, None)
    optimizer.param_groups = [group for group, _ in own]


def _counted(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key not in (*_OF_A_PART, PARTS)}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
    return bool(one == other)


class _RateCheck(TrainerCallback):
    """Stops a Trainer before the first step when its optimizer cannot keep to the rates."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look for the parameters in the groups of the optimizer.

        Raises:
            UserError: when they are not there, as under DeepSpeed, which trains flat copies.
        """
        model, optimizer = kwargs.get("model"), kwargs.get("optimizer")
        if model is None or optimizer is None:
            return
        tuners = tuners_in(model)
        rated = [parameter for tuner in tuners for parameter, _ in tuner.rates()]
        inner = unwrapped(optimizer)
        held = held_by(inner)
        lost = [parameter for parameter in rated if parameter.requires_grad and id(parameter) not in held]
        if lost or (rated and not isinstance(inner, torch.optim.Optimizer)):
            raise UserError(
                f"{_wanted(tuners)} would have no effect: {type(inner).__name__} does not hold the adapter's own "
                "parameters in its groups; leave the option out, or train with an optimizer of torch's kind"
            )


def _wanted(tuners: list[LoraplexTuner]) -> str:
    """Return the options that ask for rates."""
    of_adapters = any(True for tuner in tuners for _ in tuner.rates_of_adapters())
    of_objectives = any(True for tuner in tuners for _ in tuner.rates_of_objectives())
    return " and ".join(
        name
        for name, given in (("loraplus_lr_ratio", of_adapters), ("the objective's learning_rate", of_objectives))
        if given
    )
