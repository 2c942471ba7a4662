"""TRL's and transformers' trainers with the safety of a run: nothing that is not finite is kept, Ctrl-C loses nothing.

A language model is trained by TRL's SFTTrainer, a classification head by transformers' Trainer.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer  # type: ignore[attr-defined]

from loraplex.compat.transformers import PrinterCallback
from loraplex.errors import UserError
from loraplex.training.folder import seal
from loraplex.tuner.routing import RoutingWatch


class DivergedError(UserError):
    """A loss, gradient or weight stopped being a finite number."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C arrived; the state of training is on disk. The message says how to go on."""


class WatchedTrainer(Trainer):
    """Looks at every loss, counts the tokens that are not padding, and logs the gates of a router."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.tokens = 0
        self.routing: RoutingWatch | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run forward and backward on one batch and return its loss.

        Raises:
            DivergedError: when the loss is not finite; the weights are still those of the step before.
        """
        mask = inputs.get("attention_mask")
        self.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(value := loss.item()):
            raise DivergedError(f"the loss is {value} at step {self.state.global_step + 1}")
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, beside a training loss, how the router shares the tokens out; sites one by one go into the history."""
        overview: dict[str, float] = {}
        sites = None
        if self.routing is not None and "loss" in logs:
            overview, sites = self.routing.look(self.state.global_step, self.state.max_steps)
        elif self.routing is not None:
            self.routing.forget()
        super().log({**logs, **overview}, start_time)
        if sites is not None:
            # not among what is logged: trackers take numbers only
            history: list[dict[str, Any]] = self.state.log_history
            history[-1]["routing"] = sites

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: a run folder says what it is in its own files."""


class RunTrainer(WatchedTrainer, SFTTrainer):
    """For language models."""


class ClassifierTrainer(WatchedTrainer):
    """For classification heads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Whatever a model takes as keywords, most of their losses are means over the rows of one forward pass: the
        # Trainer has to divide by the number of passes itself.
        self.model_accepts_loss_kwargs = False


class FiniteWatch(TrainerCallback):
    """Stops training before a gradient or weight that is not finite reaches the optimizer or a checkpoint."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradients."""
        gradients = (p.grad for p in kwargs["model"].parameters() if p.requires_grad and p.grad is not None)
        if not _all_finite(gradients):
            raise DivergedError(f"a gradient is not finite at step {state.global_step + 1}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the trained weights, before they may be saved."""
        if not _all_finite(p for p in kwargs["model"].parameters() if p.requires_grad):
            raise DivergedError(f"a weight is not finite after step {state.global_step}")


class Interruption(TrainerCallback):
    """Turns the first Ctrl-C into: finish this step, save, stop. The second one stops at once.

    Used as a context manager around training, and as a callback within it.
    """

    def __init__(self) -> None:
        self.asked = False
        self._previous: Any = None

    def __enter__(self) -> Interruption:
        # A handler that was not set from Python could not be put back.
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is not None:
            self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._previous)
        sys.stderr.write("\nstopping after this step; Ctrl-C again stops at once\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the trainer to save and stop."""
        if self.asked:
            control.should_save = True
            control.should_training_stop = True


class Sealing(TrainerCallback):
    """Marks every checkpoint as whole once all of it is written."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal the checkpoint of this step."""
        assert args.output_dir is not None
        seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class Clock(TrainerCallback):
    """Seconds of every optimizer step, without logging, validation and checkpoints."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the watch."""
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the watch."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


class ProgressBar(TrainerCallback):
    """One bar over the optimizer steps with the latest loss."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar, where a resumed run left it."""
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", leave=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance."""
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the loss of the step, and the latest validation loss."""
        shown = {"loss": "loss", "eval_loss": "validation"}
        logs = kwargs.get("logs") or {}
        latest = {label: f"{logs[key]:.3f}" for key, label in shown.items() if key in logs}
        if latest:
            self._bar.set_postfix(latest)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no tensor holds NaN or Inf, with one transfer to the host for all of them."""
    # x·0 is 0 for finite x and NaN otherwise, and a sum of zeros cannot overflow.
    sums = [(tensor.detach() * 0).sum(dtype=torch.float32) for tensor in tensors]
    return not sums or bool(torch.stack([value.to(sums[0].device) for value in sums]).sum().isfinite())
