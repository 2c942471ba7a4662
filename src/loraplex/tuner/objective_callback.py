"""The callback by which every Trainer drives an objective: how far it is, what is logged, when it is over."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

from loraplex.errors import UserError
from loraplex.objectives.contracts import Objective
from loraplex.tuner import every_trainer
from loraplex.tuner.model import LoraplexTuner, tuners_in
from loraplex.tuner.objectives import name_of

_REWEIGHTING = ("dft",)
"""Losses of SFTTrainer that are computed out of the model's log-probabilities."""
_ended: weakref.WeakKeyDictionary[LoraplexTuner, dict[str, str]] = weakref.WeakKeyDictionary()
"""Objectives that a training has ended, by adapter."""


class ObjectiveCallback(TrainerCallback):
    """Acts only on models that carry an adapter of ours with an objective."""

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
            every_trainer.refuse_data_parallel(args, f"the objective '{name}'")
            objective.total = state.max_steps
        _say_what_has_ended(kwargs.get("model"))

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
                _ended.setdefault(tuner, {})[adapter_name] = name_of(tuner, adapter_name)
                tuner.detach_objective(adapter_name)


def _say_what_has_ended(model: Any) -> None:
    """Warn of a training with the plain loss after one with an objective: more epochs, or a phase of its own."""
    for tuner in tuners_in(model):
        for adapter_name, name in _ended.get(tuner, {}).items():
            if adapter_name in tuner.active_adapters and adapter_name not in tuner.objectives():
                warnings.warn(
                    f"the objective '{name}' of adapter '{adapter_name}' ended with the training before, so this one "
                    "has the plain loss: to train on with it, build the model and its adapter anew, and resume from a "
                    "checkpoint (resume_from_checkpoint)",
                    stacklevel=2,
                )


def _objectives(model: Any) -> Iterator[tuple[str, Objective]]:
    for tuner in tuners_in(model):
        for adapter_name, objective in _trained(tuner).items():
            yield name_of(tuner, adapter_name), objective


def _trained(tuner: LoraplexTuner) -> dict[str, Objective]:
    """Return the objectives of the active adapters; those of others wait for a training of their own."""
    return {name: objective for name, objective in tuner.objectives().items() if name in tuner.active_adapters}
