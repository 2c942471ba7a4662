"""Loading a finished adapter together with its base model, from an adapter folder, a run folder or a hub id."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from loraplex.compat.peft import CONFIG_NAME
from loraplex.errors import UserError
from loraplex.models import fingerprint
from loraplex.models.classifier import load_classifier
from loraplex.models.loading import DType, load_model
from loraplex.models.quiet import quiet
from loraplex.tuner.adapter_folder import local_folder, read_config
from loraplex.tuner.adapter_loading import load_adapter


def adapter_folder(adapter: str) -> Path:
    """Return the folder that holds the adapter's files: `adapter` itself, the one in a run folder, or a download.

    Raises:
        UserError: when there is no such adapter, or it lacks a file.
    """
    path = Path(adapter).expanduser()
    if (path / "adapter" / CONFIG_NAME).is_file() and not (path / CONFIG_NAME).is_file():
        path = path / "adapter"
    return local_folder(str(path) if path.is_dir() else adapter)


def base_name(adapter: str) -> str:
    """Return the name of the base model that the adapter was trained on, as its own record has it, else PEFT's.

    Raises:
        UserError: when the folder names none, or its files cannot be read.
    """
    folder = adapter_folder(adapter)
    record = folder / fingerprint.FILE
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["name"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} is damaged ({error}): name the base model with --model") from error
    name = read_config(folder).base_model_name_or_path
    if not name:
        raise UserError(f"the adapter in '{folder}' does not say which model it was trained on: name it with --model")
    return str(name)


def classes_of_adapter(adapter: str) -> tuple[str, ...] | None:
    """Return the names of the classes that an adapter with a classification head tells apart, None for any other.

    Raises:
        UserError: when there is no such adapter, or its files cannot be read.
    """
    return fingerprint.recorded_classes(adapter_folder(adapter))


def load_adapted(adapter: str, model: str | None = None, dtype: DType = "auto") -> PeftModel:
    """Return the base model with the adapter on it, in evaluation mode, on the accelerator where there is one.

    `model` overrules the recorded base. An adapter that was trained with a classification head gets one.

    Raises:
        UserError: when the adapter or its base cannot be read, or the two do not fit.
    """
    name, folder = model or base_name(adapter), adapter_folder(adapter)
    classes = fingerprint.recorded_classes(folder)
    return adapt(load_model(name, dtype) if classes is None else load_classifier(name, classes, dtype), folder)


def refuse_classifier(adapter: str, what: str) -> None:
    """Refuse an adapter with a classification head for `what`, which needs a language model.

    Raises:
        UserError: when it is one.
    """
    if (classes := classes_of_adapter(adapter)) is not None:
        raise UserError(
            f"'{adapter}' tells classes apart ({', '.join(classes)}) and says nothing else: {what} needs a language "
            "model; measure it with 'loraplex eval ADAPTER --data ...'"
        )


def adapt(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Return `base` with the adapter in `folder` on it, in evaluation mode, on the accelerator where there is one.

    Raises:
        UserError: when the adapter cannot be read, or does not fit the base.
    """
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        torch.nn.Module.to(base, accelerator)
    fingerprint.check_base(base, folder)
    with quiet():
        adapted = load_adapter(base, folder)
    adapted.eval()
    return adapted
