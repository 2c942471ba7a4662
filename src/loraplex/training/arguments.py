"""From the recipe to the trainer's arguments: every setting that matters is said, none is left to a shipped default.

They are TRL's SFTConfig for a language model, transformers' TrainingArguments for a classification head.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from trl import SFTConfig  # type: ignore[attr-defined]

from loraplex.compat.transformers import checkpointing_argument
from loraplex.errors import UserError, nearest
from loraplex.training.recipe import Recipe

# The argument's name -> the recipe's key, where the value is passed on as it is.
FROM_TRAINING = {
    "learning_rate": "learning_rate",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "optim": "optimizer",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "bf16": "autocast",
    "save_total_limit": "keep_checkpoints",
    "eval_steps": "eval_every",
    "load_best_model_at_end": "load_best",
    "logging_steps": "logging_every",
}
# The same for values that are translated, and for arguments that transformers calls by one name or another.
TRANSLATED = {
    "activation_checkpointing": "training.gradient_checkpointing",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "output_dir": "output",
    "seed": "seed",
    "max_steps": "training.max_steps",
    "max_length": "training.max_length",
    "save_steps": "training.save_every",
    "save_strategy": "training.save_every",
    "eval_strategy": "training.eval_every",
    "logging_strategy": "training.logging_every",
}
# Never due within a run, yet transformers still saves at the last step.
ONLY_AT_THE_END = 10**9


def trainer_arguments(recipe: Recipe, checkpoints: Path) -> TrainingArguments:
    """Return the trainer's arguments of a recipe; checkpoints go to the folder `checkpoints`.

    Raises:
        UserError: for a name in `training.trainer_args` that they lack, that the recipe has a key for or that the
            command sets itself, and for values that they refuse.
    """
    cls = TrainingArguments if recipe.model.classifies else SFTConfig
    options = recipe.training
    # load_best wants every checkpoint validated.
    save_steps = options.save_every or (options.eval_every if options.load_best else ONLY_AT_THE_END)
    said: dict[str, Any] = {name: getattr(options, key) for name, key in FROM_TRAINING.items()}
    said |= {
        "output_dir": str(checkpoints),
        checkpointing_argument(cls): options.gradient_checkpointing,
        "seed": recipe.seed,
        "max_steps": options.max_steps or -1,
        "save_strategy": "steps",
        "save_steps": save_steps,
        "eval_strategy": "steps" if options.eval_every else "no",
        "metric_for_best_model": "eval_loss" if options.load_best else None,
        "logging_strategy": "steps",
        # A loss that is not finite stops the run; it must not be averaged away.
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Unsaid, autocast would be refused where there is no accelerator.
        "use_cpu": torch.accelerator.current_accelerator(check_available=True) is None,
    }
    changeable: dict[str, Any] = {"per_device_eval_batch_size": options.batch_size, "report_to": "none"}
    if cls is SFTConfig:
        # Rows come tokenized and cut to length, with labels.
        said |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        # Our tuner takes the padding out of a batch itself.
        changeable |= {"pad_to_multiple_of": None, "padding_free": False}
    _check_names(options.trainer_args, said, cls)
    try:
        return cls(**{**changeable, **said, **options.trainer_args})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error


def _check_names(extra: dict[str, Any], said: dict[str, Any], cls: type[TrainingArguments]) -> None:
    known = {entry.name for entry in dataclasses.fields(cls) if entry.init}
    keys = {name: f"training.{key}" for name, key in FROM_TRAINING.items()} | TRANSLATED
    for name in extra:
        if name not in known:
            raise UserError(f"training.trainer_args.{name} is not an argument of {cls.__name__}.{nearest(name, known)}")
        if name in keys:
            raise UserError(f"training.trainer_args.{name}: set {keys[name]} instead")
        if name in said:
            raise UserError(f"training.trainer_args.{name}: leave it out, the command sets it")
