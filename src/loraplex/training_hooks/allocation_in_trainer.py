"""How any `transformers.Trainer` drives the allocations of the model it trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

from loraplex.adapters.registry import REGISTRY, Axis, describe_member
from loraplex.allocation.contracts import Batch
from loraplex.compat.accelerate import unwrapped
from loraplex.errors import UserError
from loraplex.training_hooks.allocation import AllocationController
from loraplex.training_hooks.closed_ranks import ClosedRanks
from loraplex.training_hooks.contracts import TrainingHook, refuse_data_parallel
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.model import LoraplexTuner, tuners_in

logger = logging.getLogger("loraplex.allocation")
HISTORY = "allocation"
"""Key of a decision in the trainer's log history, which checkpoints carry."""


class AllocationInTrainer(TrainingHook):
    """Lets every Trainer drive the allocations of the adapters that it trains."""

    def __init__(self, closed_ranks: ClosedRanks) -> None:
        self.closed_ranks = closed_ranks

    def concerns(self, tuner: LoraplexTuner) -> bool:
        """Return whether an adapter has ranks that may move."""
        return self.closed_ranks.concerns(tuner)

    def in_trainer(self) -> TrainerCallback:
        """Return the part that begins with training, revises between steps, and finishes when training has ended."""
        return _Driving(self.closed_ranks)


class _Driving(TrainerCallback):
    """Begins with training, revises between steps, finishes when training has ended."""

    def __init__(self, closed_ranks: ClosedRanks) -> None:
        self.closed_ranks = closed_ranks
        self.controllers: list[AllocationController] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin: before the first step, or where the checkpoint stands."""
        model, loader = kwargs.get("model"), kwargs.get("train_dataloader")
        if model is None or loader is None:
            return
        # what an interrupted training has left behind
        self.controllers.clear()
        per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps) if hasattr(loader, "__len__") else 0
        steps = (state.max_steps, per_epoch or state.max_steps)
        batches = _Batches(loader, state.train_batch_size or args.per_device_train_batch_size)
        for tuner in tuners_in(model):
            for name in tuner.active_adapters:
                config = tuner.peft_config[name]
                assert isinstance(config, AdapterConfig)
                _check_checkpoint(state, name, config, config.allocation.due(*steps))
                if config.allocation.moves_ranks:
                    _check_launch(args, f"the allocation of '{name}'")
                    controller = AllocationController(tuner, name, batches.first, *steps, logger.info, _precision(args))
                    controller.begin(state.global_step)
                    self.controllers.append(controller)
        self._record(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Revise where it is due; the last step of all decides nothing more."""
        for controller in self.controllers:
            if controller.reached(state.global_step) and kwargs.get("optimizer") is not None:
                # now, and not at the next step: a checkpoint of this one is written first
                self.closed_ranks.start_opened(unwrapped(kwargs["optimizer"]), controller.tuner)
        self._record(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish: the best checkpoint, if it was asked for, has been loaded by now."""
        for controller in self.controllers:
            controller.finish()
        self.controllers.clear()

    def _record(self, state: Any) -> None:
        for controller in self.controllers:
            mine = {"adapter": controller.adapter_name, "options": describe_member(controller.config.allocation)}
            known = {entry["step"] for entry in _decisions_of(controller.adapter_name, state.log_history)}
            new = [decision for decision in controller.decisions if decision.step not in known]
            state.log_history.extend({"step": one.step, **mine, HISTORY: one.describe()} for one in new)


def _decisions_of(adapter_name: str, history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in history if HISTORY in entry and entry.get("adapter", adapter_name) == adapter_name]


def _check_checkpoint(state: Any, name: str, config: AdapterConfig, due: Sequence[int]) -> None:
    """Refuse to go on from a checkpoint whose gates another allocation has set than the one that the adapter has."""
    found, now = _decisions_of(name, state.log_history), describe_member(config.allocation)
    before = found[-1].get("options", now) if found else now
    if not found and state.global_step and any(step <= state.global_step for step in due):
        before = REGISTRY.default(Axis.ALLOCATION).name
    if before != now:
        raise UserError(
            f"the checkpoint of step {state.global_step} was trained with the allocation {before!r}, adapter '{name}' "
            f"has {now!r}: resume with the former, or start anew"
        )


def _check_launch(args: Any, what: str) -> None:
    """Refuse where the model's own parameters are not what trains."""
    if getattr(args, "deepspeed", None):
        raise UserError(f"{what} cannot act under DeepSpeed, which trains flat copies of parameters: launch with DDP")
    refuse_data_parallel(args, what)


def _precision(args: Any) -> Callable[[], AbstractContextManager[object]]:
    """Return what training steps are computed under; float32 for float16, whose gradients vanish without a scaler."""
    return partial(torch.autocast, args.device.type, torch.bfloat16) if args.bf16 else nullcontext


class _Batches:
    """The first batches of the training set in its own order, whatever order it is trained in."""

    def __init__(self, loader: Any, size: int) -> None:
        self.loader, self.size = loader, size
        self.kept: Sequence[Batch] = ()

    def first(self, count: int) -> Sequence[Batch]:
        """Return the first `count` batches, or as many as there are."""
        if len(self.kept) < count:
            dataset = self.loader.dataset
            if isinstance(dataset, IterableDataset):
                self.kept = list(islice(iter(self.loader), count))
            else:
                # a generator of its own, or it would draw from the one that dropout draws from
                own = torch.Generator()
                ordered = DataLoader(dataset, batch_size=self.size, collate_fn=self.loader.collate_fn, generator=own)
                self.kept = list(islice(iter(ordered), count))
        return self.kept[:count]


def decisions(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the decisions in a trainer's log history, each as `Decision.describe` has it."""
    return [entry[HISTORY] for entry in history if HISTORY in entry]
