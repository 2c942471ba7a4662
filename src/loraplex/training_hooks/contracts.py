"""What a training hook is: something that acts around optimizer steps, and on what a Trainer announces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from loraplex.errors import UserError
from loraplex.tuner.model import LoraplexTuner


class TrainingHook(ABC):
    """Acts around the steps of every optimizer in the process, on the tuners that it concerns.

    A hook keeps what it has to remember on itself, keyed weakly by tuner or optimizer.
    """

    @abstractmethod
    def concerns(self, tuner: LoraplexTuner) -> bool:
        """Return whether there is anything to do for a tuner that has just got an adapter."""

    def before_step(self, optimizer: torch.optim.Optimizer, tuners: Sequence[LoraplexTuner]) -> None:
        """Act before an optimizer steps. `tuners` are all that any hook is concerned with.

        Raises:
            UserError: when this step must not be made.
        """
        return

    def after_step(self, optimizer: torch.optim.Optimizer, tuners: Sequence[LoraplexTuner]) -> None:
        """Act after an optimizer has stepped."""
        return

    def in_trainer(self) -> TrainerCallback | None:
        """Return the part of this hook in a Trainer that is being made; None where it has none."""
        return None


def held_by(optimizer: Any) -> set[int]:
    """Return the ids of all parameters in an optimizer's groups."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def refuse_data_parallel(args: Any, what: str) -> None:
    """Refuse training on several GPUs by threads of one process, which is what Trainer does when nothing launches it.

    Raises:
        UserError: then; it names `what` cannot act there.
    """
    if args.n_gpu > 1:
        raise UserError(
            f"{what} cannot act under DataParallel, which trains copies of the model: launch one process per GPU "
            "(torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES to one of them"
        )
