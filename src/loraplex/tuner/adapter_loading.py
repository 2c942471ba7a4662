"""load_adapter: brings a stock PEFT LoRA or DoRA folder, or any of ours, into a loraplex model."""

from __future__ import annotations

import os
from typing import Any

from peft import PeftModel
from torch import nn

from loraplex.errors import UserError
from loraplex.tuner.adapter_folder import check_weights, local_folder, read_config
from loraplex.tuner.model import LoraplexTuner
from loraplex.tuner.options import AdapterOptions
from loraplex.tuner.sites import without_absent_names
from loraplex.tuner.transaction import all_or_nothing

_HUB = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    is_trainable: bool = False,
    allow_nonfinite: bool = False,
    **kwargs: Any,
) -> PeftModel:
    """Load the adapter in `path` (a folder or hub id) under `name` and return the PEFT model that carries it.

    `model` is a base model, or a model that carries loraplex adapters already; then the adapter is added beside them
    and the active one stays active. `kwargs` go to the hub (revision, token, …) and to PEFT's loader
    (low_cpu_mem_usage, autocast_adapter_dtype, …). When loading fails the model is as it was before.

    Raises:
        UserError: when the folder is not whole, the adapter uses what loraplex does not represent, a tensor is
            missing, not expected, of another shape or (without `allow_nonfinite`) not finite, or when the model
            carries adapters of PEFT's own tuner.
    """
    if isinstance(model, PeftModel) and not isinstance(model.base_model, LoraplexTuner):
        raise UserError("the model carries adapters of PEFT's own tuner: load those through loraplex.load_adapter too")
    folder = local_folder(os.fspath(path), **{key: kwargs.pop(key) for key in _HUB if key in kwargs})
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = without_absent_names(base, read_config(folder))
    config.inference_mode = not is_trainable
    check_weights(folder, allow_nonfinite=allow_nonfinite)
    with all_or_nothing(model):
        try:
            return _load(model, str(folder), name, config, is_trainable, kwargs)
        except KeyError as error:
            # PEFT looks up modules_to_save and trainable tokens without checking; their keys are dotted names
            if not isinstance(error.args[0], str) or "." not in error.args[0]:
                raise
            raise UserError(f"the adapter file in {folder} lacks a tensor: {error.args[0]}") from None


def _load(
    model: nn.Module, folder: str, name: str, config: AdapterOptions, is_trainable: bool, kwargs: dict[str, Any]
) -> PeftModel:
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(
            model, folder, adapter_name=name, is_trainable=is_trainable, config=config, **kwargs
        )
    options = {key: kwargs[key] for key in ("low_cpu_mem_usage", "autocast_adapter_dtype") if key in kwargs}
    model.add_adapter(name, config, **options)
    if is_trainable:
        model.set_requires_grad(name)
    training = model.training
    model.load_adapter(folder, name, is_trainable=is_trainable, **kwargs)
    # PEFT switches to evaluation for an adapter that is not trainable, also under one that is being trained
    model.train(training)
    return model
