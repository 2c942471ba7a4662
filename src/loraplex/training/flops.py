"""Floating-point operations of training, counted as torch carries them out, not estimated from a formula."""

from __future__ import annotations

from torch.utils.flop_counter import FlopCounterMode

from loraplex.training.trainer import RunTrainer


def flops_per_token(trainer: RunTrainer) -> float:
    """Return the operations of forward and backward pass per real token, over a batch of the training rows.

    Products of matrices and attention are counted, two operations per multiply-add; padding that goes through the model
    is paid for by the real tokens. Nothing is updated, but random numbers are drawn: count after training, or in a
    process of its own.
    """
    model = trainer.model
    assert model is not None
    model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with FlopCounterMode(display=False) as counter:
        trainer.compute_loss(model, batch).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    mask = batch.get("attention_mask")
    tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
    return float(counter.get_total_flops()) / tokens
