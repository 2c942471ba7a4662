"""load_adapter: brings a stock PEFT LoRA or DoRA folder, or any of ours, into a loraplex model."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

from loraplex.errors import UserError
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.model import LoraplexTuner


def load_adapter(
    model: nn.Module, path: str, name: str = "default", *, is_trainable: bool = False, **kwargs: Any
) -> PeftModel:
    """Load the adapter in `path` (a folder or hub id) under `name` and return the PEFT model that carries it.

    `model` is a base model, or a model that carries loraplex adapters already; then the adapter is added beside them
    and the active one stays active. `kwargs` go to PEFT's loader (revision, token, …).

    Raises:
        UserError: when the adapter uses what loraplex does not represent, when a tensor is missing, not expected or
            does not fit, or when the model carries adapters of PEFT's own tuner.
    """
    config = PeftConfig.from_pretrained(path, **kwargs)
    if isinstance(config, LoraConfig):
        config = AdapterConfig.from_peft(config)
    if not isinstance(config, AdapterConfig):
        raise UserError(f"{path} is a {config.peft_type} adapter: loraplex loads its own and PEFT's LORA")
    config.inference_mode = not is_trainable
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(
            model, path, adapter_name=name, is_trainable=is_trainable, config=config, **kwargs
        )
    if not isinstance(model.base_model, LoraplexTuner):
        raise UserError("the model carries adapters of PEFT's own tuner: load those through loraplex.load_adapter too")
    model.add_adapter(name, config)
    model.load_adapter(path, name, is_trainable=is_trainable, **kwargs)
    return model
