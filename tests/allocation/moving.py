"""A tiny model whose allocation moves ranks, trained by a Trainer or step by step."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tests.allocation.scenes import batches
from tests.tuner.tiny_models import llama
from tests.tuner.trainer_arguments import arguments as defaults
from torch import Tensor
from transformers import Trainer, TrainingArguments

from loraplex import AdapterConfig, ALoRA, HeteroLoRA

ROWS = [{"input_ids": list(range(5 + i, 15 + i)), "labels": list(range(5 + i, 15 + i))} for i in range(16)]
DYNAMIC = HeteroLoRA(batches=2, interval=2)
PROPORTIONAL = HeteroLoRA(batches=2, interval=2, ranks="proportional", unit="parameters")
MOVING = ALoRA(rounds=2, warmup_epochs=2, interval_epochs=2, in_steps=True, ranks_per_round=3)


def adapted(allocation: Any, **fields: Any) -> PeftModel:
    config = AdapterConfig(
        allocation=allocation,
        **{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "seed": 0, "task_type": "CAUSAL_LM", **fields},
    )
    return get_peft_model(llama(), config)


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    own = {"learning_rate": 3e-2, "weight_decay": 0.1, "per_device_train_batch_size": 2, "seed": 3, **changed}
    return TrainingArguments(**defaults(folder, **own))


def train(model: PeftModel, folder: Path, resume: str | None = None, **changed: Any) -> Trainer:
    trainer = Trainer(model, arguments(folder, **changed), train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def step(model: PeftModel, optimizer: torch.optim.Optimizer, index: int = 0) -> None:
    """Take one step of a plain loop on one of the batches."""
    optimizer.zero_grad()
    model(**batches()[index % 3]).loss.backward()
    optimizer.step()


def state(model: PeftModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "loraplex" in name}
