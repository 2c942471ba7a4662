"""Floating-point operations of training, counted as torch carries them out, not estimated from a formula."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from loraplex.compat.torch import FlopCounterMode
from loraplex.compat.transformers import prepared_inputs
from loraplex.training.trainer import WatchedTrainer
from loraplex.tuner.model import tuners_in


def flops_per_token(trainer: WatchedTrainer) -> float:
    """Return the operations of forward and backward pass per real token, over a batch of the training rows.

    Where an objective draws what a step does, it is the mean over the kinds of steps, weighted by their probability.

    Products of matrices and attention are counted, two operations per multiply-add; padding that goes through the model
    is paid for by the real tokens. Nothing is updated, but random numbers are drawn: count after training, or in a
    process of its own.
    """
    model = trainer.model
    assert model is not None
    model.train()
    batch = prepared_inputs(trainer, next(iter(trainer.get_train_dataloader())))
    operations = 0.0
    for share, kind in _kinds_of_steps(model):
        with kind, FlopCounterMode(display=False) as counter:
            loss = trainer.compute_loss(model, dict(batch))
            assert isinstance(loss, torch.Tensor)
            loss.backward()
        operations += share * counter.get_total_flops()
        model.zero_grad()
    mask = batch.get("attention_mask")
    tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
    return operations / tokens


def _kinds_of_steps(model: nn.Module) -> list[tuple[float, AbstractContextManager[None]]]:
    """Return the kinds of steps that the objective draws, if the model has one, and how often each occurs."""
    tuners = tuners_in(model)
    objectives = [objective for tuner in tuners for objective in tuner.objectives().values()]
    return objectives[0].kinds_of_steps() if objectives else [(1.0, nullcontext())]
