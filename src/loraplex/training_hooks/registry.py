"""The one list of tuners that hooks act on, the one pair of hooks on optimizers, the one callback in every Trainer.

Nothing is installed before a tuner concerns a hook: a plain LoRA leaves torch and transformers as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from loraplex.compat.torch import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from loraplex.compat.transformers import join_every_trainer
from loraplex.training_hooks.allocation_in_trainer import AllocationInTrainer
from loraplex.training_hooks.closed_ranks import ClosedRanks
from loraplex.training_hooks.contracts import TrainingHook
from loraplex.training_hooks.learning_rates import LearningRates
from loraplex.training_hooks.objective import ObjectiveSteps
from loraplex.tuner.model import LoraplexTuner


class Registry:
    """Hooks in the order in which they act, and the tuners that at least one of them is concerned with."""

    def __init__(self, hooks: Sequence[TrainingHook]) -> None:
        self.hooks = hooks
        self._tuners: weakref.WeakSet[LoraplexTuner] = weakref.WeakSet()
        self._installed = False

    def watch(self, tuner: LoraplexTuner) -> None:
        """From now on act on this tuner, if there is anything to do for it."""
        if any(hook.concerns(tuner) for hook in self.hooks):
            self._tuners.add(tuner)
            self._install()

    def _install(self) -> None:
        if not self._installed:
            self._installed = True
            register_optimizer_step_pre_hook(self._before_step)
            register_optimizer_step_post_hook(self._after_step)
            join_every_trainer(LoraplexCallback)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if tuners := list(self._tuners):
            for hook in self.hooks:
                hook.before_step(optimizer, tuners)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        tuners = list(self._tuners)
        # in the reverse order: what was done last is undone first
        for hook in reversed(self.hooks):
            hook.after_step(optimizer, tuners)


def _all_hooks() -> list[TrainingHook]:
    closed_ranks = ClosedRanks()
    return [AllocationInTrainer(closed_ranks), closed_ranks, LearningRates(), ObjectiveSteps()]


REGISTRY = Registry(_all_hooks())


class LoraplexCallback(TrainerCallback):
    """The callback of loraplex in a Trainer: hands every event to the hooks' parts, in the order of the hooks.

    It does nothing for models without an adapter that a hook is concerned with.
    """

    def __init__(self) -> None:
        self.parts = [part for hook in REGISTRY.hooks if (part := hook.in_trainer()) is not None]

    def _pass_on(self, event: str, *args: Any, **kwargs: Any) -> None:
        for part in self.parts:
            getattr(part, event)(*args, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training begins: see the hooks' parts."""
        self._pass_on("on_train_begin", args, state, control, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An optimizer step begins."""
        self._pass_on("on_step_begin", args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An optimizer step is done."""
        self._pass_on("on_step_end", args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Something is about to be logged."""
        self._pass_on("on_log", args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training has ended; the best checkpoint, if it was asked for, has been loaded."""
        self._pass_on("on_train_end", args, state, control, **kwargs)
