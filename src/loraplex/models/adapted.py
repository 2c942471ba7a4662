"""Loading a finished adapter together with its base model, from an adapter folder, a run folder or a hub id."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError

from loraplex.errors import UserError
from loraplex.models.loading import DType, load_model, quiet
from loraplex.training import base_model
from loraplex.tuner.loading import load_adapter

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# What PEFT and safetensors raise for a folder that is foreign, incomplete or damaged.
_LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)


def adapter_folder(adapter: str) -> str:
    """Return the folder that holds the adapter files: `adapter` itself, or the one inside a run folder.

    What is not a folder is taken for a hub id and returned as it is.

    Raises:
        UserError: when the folder holds no adapter, or one without a file that it needs.
    """
    path = Path(adapter).expanduser()
    if not path.is_dir():
        if path.exists() or adapter.startswith((".", "/", "~")) or adapter.count("/") != 1:
            raise UserError(f"there is no adapter folder '{adapter}': give the folder that the adapter was saved to")
        return adapter
    inside = path / "adapter"
    folder = inside if (inside / CONFIG).is_file() and not (path / CONFIG).is_file() else path
    if not (folder / CONFIG).is_file():
        raise UserError(f"'{adapter}' is not an adapter: it has no {CONFIG}; give the folder the adapter was saved to")
    if not (folder / WEIGHTS).is_file():
        # A file of another kind may run code when it is read.
        raise UserError(f"the adapter in '{folder}' has no {WEIGHTS}, the only kind of weights loraplex reads")
    return str(folder)


def base_name(adapter: str) -> str:
    """Return the name of the base model that the adapter was trained on, as its own record has it, else PEFT's.

    Raises:
        UserError: when the folder names none, or its files cannot be read.
    """
    source = adapter_folder(adapter)
    try:
        recorded = json.loads((Path(source) / base_model.FILE).read_text(encoding="utf-8"))
        return str(recorded["name"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{Path(source) / base_model.FILE} is damaged: name the base model with --model") from error
    try:
        name = PeftConfig.from_pretrained(source).base_model_name_or_path
    except _LOADING_ERRORS as error:
        raise _unreadable(source, error) from error
    if not name:
        raise UserError(f"the adapter in '{source}' does not say which model it was trained on: name it with --model")
    return str(name)


def load_adapted(adapter: str, model: str | None = None, dtype: DType = "auto") -> PeftModel:
    """Return the base model with the adapter on it, in evaluation mode, on the accelerator where there is one.

    `model` overrules the recorded base.

    Raises:
        UserError: when the adapter or its base cannot be read, or the two do not fit.
    """
    source = adapter_folder(adapter)
    base = load_model(model or base_name(source), dtype)
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        torch.nn.Module.to(base, accelerator)
    base_model.check_base(base, Path(source))
    try:
        with quiet():
            adapted = load_adapter(base, source)
    except UserError:
        raise
    except _LOADING_ERRORS as error:
        raise _unreadable(source, error) from error
    adapted.eval()
    return adapted


def _unreadable(source: str, error: Exception) -> UserError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(f"cannot load the adapter '{source}': {lines[0].rstrip('.:')}; save or copy it again")
