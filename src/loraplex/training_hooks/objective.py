"""An objective between steps: how far training is, what is logged, when it is over.

Steps are counted after every optimizer step; a Trainer tells its own count, and ends the objective with its training.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from loraplex.adapters.contracts import SiteAdapter
from loraplex.errors import UserError
from loraplex.objectives.contracts import Objective
from loraplex.training_hooks.contracts import TrainingHook, held_by, refuse_data_parallel
from loraplex.tuner.model import LoraplexTuner, tuners_in
from loraplex.tuner.objectives import name_of, sites_of

_REWEIGHTING = ("dft",)
"""Losses of SFTTrainer that are computed out of the model's log-probabilities."""


class ObjectiveSteps(TrainingHook):
    """Counts the optimizer steps of the adapters that have an objective."""

    def __init__(self) -> None:
        self.ended: weakref.WeakKeyDictionary[LoraplexTuner, dict[str, str]] = weakref.WeakKeyDictionary()
        """Names of the objectives that a training has ended, by adapter."""

    def concerns(self, tuner: LoraplexTuner) -> bool:
        """Return whether an objective is attached."""
        return bool(tuner.objectives())

    def after_step(self, optimizer: torch.optim.Optimizer, tuners: Sequence[LoraplexTuner]) -> None:
        """Count a step for every objective whose adapter the optimizer holds."""
        held = held_by(optimizer)
        for tuner in tuners:
            for name, objective in tuner.objectives().items():
                # one of them: an optimizer may hold a part of an adapter only
                first = _first_trained(sites_of(tuner, name).values())
                if first is not None and id(first) in held:
                    objective.step += 1

    def in_trainer(self) -> TrainerCallback:
        """Return the part that tells steps, logs and ends the objective."""
        return _ObjectiveInTrainer(self)


def _first_trained(adapters: Iterable[SiteAdapter]) -> nn.Parameter | None:
    return next((p for adapter in adapters for p in adapter.parameters() if p.requires_grad), None)


class _ObjectiveInTrainer(TrainerCallback):
    """Acts only on models that carry an adapter of ours with an objective."""

    def __init__(self, steps: ObjectiveSteps) -> None:
        self.ended = steps.ended

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the number of steps, and refuse what would change the loss behind the objective's back.

        Raises:
            UserError: for a loss of the trainer's that is computed out of the model's (TRL's dft).
        """
        for name, objective in _objectives(kwargs.get("model")):
            kind = getattr(args, "loss_type", None)
            if kind in _REWEIGHTING:
                raise UserError(
                    f"loss_type is '{kind}', which reweights the loss of the objective '{name}': leave it at 'nll', or "
                    "set the adapter's objective to plain"
                )
            refuse_data_parallel(args, f"the objective '{name}'")
            objective.total = state.max_steps
        self._say_what_has_ended(kwargs.get("model"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the step."""
        for _, objective in _objectives(kwargs.get("model")):
            objective.step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the parts of the loss to what is logged, for whoever logs after this."""
        if not logs or "loss" not in logs:
            return
        for name, objective in _objectives(kwargs.get("model")):
            parts = {f"{name}/{part}": value for part, value in objective.report().items()}
            logs.update(parts)
            state.log_history[-1].update(parts)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the objective: what is saved after training is the adapter alone."""
        for tuner in tuners_in(kwargs.get("model")):
            for adapter_name in _trained(tuner):
                self.ended.setdefault(tuner, {})[adapter_name] = name_of(tuner, adapter_name)
                tuner.detach_objective(adapter_name)

    def _say_what_has_ended(self, model: Any) -> None:
        """Warn of a training with the plain loss after one with an objective: more epochs, or a phase of its own."""
        for tuner in tuners_in(model):
            for adapter_name, name in self.ended.get(tuner, {}).items():
                if adapter_name in tuner.active_adapters and adapter_name not in tuner.objectives():
                    warnings.warn(
                        f"the objective '{name}' of adapter '{adapter_name}' ended with the training before, so this "
                        "one has the plain loss: to train on with it, build the model and its adapter anew, and resume "
                        "from a checkpoint (resume_from_checkpoint)",
                        stacklevel=2,
                    )


def _objectives(model: Any) -> Iterator[tuple[str, Objective]]:
    for tuner in tuners_in(model):
        for adapter_name, objective in _trained(tuner).items():
            yield name_of(tuner, adapter_name), objective


def _trained(tuner: LoraplexTuner) -> dict[str, Objective]:
    """Return the objectives of the active adapters; those of others wait for a training of their own."""
    return {name: objective for name, objective in tuner.objectives().items() if name in tuner.active_adapters}
