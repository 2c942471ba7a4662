"""Trainer and SFTTrainer over an Echo whose parts are drawn, for a few steps on rows of different lengths."""

import pytest
import torch
from tests.extras import TRL
from tests.objectives.echoing import echoing, rows
from tests.tuner.letters import letters
from tests.tuner.trainer_arguments import arguments as defaults
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

RANDOM = {"name": "echo", "probability": 0.6, "target_dropout": 0.2, "ramp": 0.5}
KINDS = pytest.mark.parametrize("kind", ["trainer", pytest.param("sft", marks=TRL)])
LENGTHS = [(3 + i % 4, 2 + (i * 5) % 6) for i in range(24)]


def data():
    return [{"input_ids": ids, "labels": labels} for ids, labels in rows(LENGTHS)]


def arguments(folder, **overrides):
    return defaults(folder, **{"max_steps": 4, "weight_decay": 0.1, **overrides})


def fresh(objective=RANDOM, adapter="lora", dtype=torch.float32, moved=False, **fields):
    return echoing(objective, adapter=adapter, dtype=dtype, moved=moved, **{"seed": 3, **fields})


def run(kind, model, folder, **overrides):
    """Return a Trainer or an SFTTrainer on these rows."""
    if kind == "sft":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        given = {"bf16": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        args = SFTConfig(**arguments(folder, **{**given, **overrides}))
        return SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(data()), processing_class=letters())
    collator = DataCollatorForSeq2Seq(letters(), padding=True)
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments(folder, **overrides)),
        train_dataset=data(),
        eval_dataset=data(),
        data_collator=collator,
    )


def history(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]
