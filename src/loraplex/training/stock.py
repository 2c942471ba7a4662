"""Adapters of stock PEFT in a run of ours: any of its configurations, by its own names, through the same loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraplex.compat.peft import config_types
from loraplex.errors import UserError, nearest
from loraplex.tuner.options import LoraplexType


def stock_config(section: Mapping[str, Any], max_steps: int | None = None, task_type: str = "CAUSAL_LM") -> PeftConfig:
    """Return PEFT's config of a recipe's `peft` section: `peft_type` and the fields of that type's config.

    Where the section is silent, the task is `task_type`, the targets are all linear layers, and a config that needs to
    know the number of optimizer steps (`total_step` of AdaLoRA) gets `max_steps`.

    Raises:
        UserError: for an unknown type or field, a value that PEFT refuses, or steps that are needed and not known.
    """
    classes = config_types()
    types = sorted(kind for kind in classes if kind != LoraplexType.LORAPLEX.value)
    wanted = str(section.get("peft_type", "")).upper()
    if wanted not in types:
        hint = nearest(wanted, types) or f" There are {', '.join(types)}."
        raise UserError(f"peft.peft_type is {section.get('peft_type')!r}, which is not an adapter of PEFT.{hint}")
    cls = classes[wanted]
    known = {entry.name for entry in dataclasses.fields(cls) if entry.init}
    for name in section:
        if name not in known:
            raise UserError(f"peft.{name} is not a field of {cls.__name__}.{nearest(name, known)}")
    given = {name: value for name, value in section.items() if name != "peft_type"}
    if "target_modules" in known:
        given.setdefault("target_modules", "all-linear")
    if "total_step" in known and "total_step" not in given:
        if max_steps is None:
            raise UserError(f"peft: {wanted} needs the number of steps: set training.max_steps or peft.total_step")
        given["total_step"] = max_steps
    try:
        config = cls(**{"task_type": task_type, **given})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"peft: {' '.join(str(error).split())}") from error
    assert isinstance(config, PeftConfig)
    return config


def allocates(model: PeftModel) -> bool:
    """Tell whether the adapter moves its ranks while training and waits to be told after every step."""
    return hasattr(model.base_model, "update_and_allocate")


class Allocating(TrainerCallback):
    """Makes the call after every optimizer step that PEFT's allocating adapters leave to the loop (AdaLoRA)."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the adapter look at the gradients, which are still there."""
        # the number of the step that has just been made: with 0 for the first, the step that fixes the final ranks
        # (total_step where tfinal is 0) would never come, and the last ranks would be those of an earlier budget
        kwargs["model"].base_model.update_and_allocate(state.global_step + 1)
