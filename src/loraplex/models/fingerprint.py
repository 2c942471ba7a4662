"""Which base model an adapter was trained on: recorded beside the adapter, checked before the adapter is used."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.compat.peft import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from loraplex.errors import UserError
from loraplex.files import write_json
from loraplex.models.classifier import HEADS, classes_of, head_parameters

FILE = "base_model.json"
# Config values that decide the shapes of the weights, where an architecture has them.
SHAPING = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "n_embd",
    "n_layer",
    "n_head",
)
SAMPLED_TENSORS = 8
SAMPLED_NUMBERS = 4096


def describe_base(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """Return what identifies a base model: name, commit, shapes, size and a fingerprint of its weights.

    Of a classification head, which belongs to the adapter, only the names of its classes. Call it before adapters are
    added. `name` is the recipe's; the commit is known for models from the hub.
    """
    config = model.config.get_text_config()
    classes = classes_of(model)
    return {
        "name": name,
        **({"classes": list(classes)} if classes else {}),
        "commit": getattr(model.config, "_commit_hash", None),
        "shape": {key: getattr(config, key) for key in SHAPING if getattr(config, key, None) is not None},
        "parameters": sum(parameter.numel() for _, parameter in _frozen(model)),
        "config_sha256": hashlib.sha256(model.config.to_json_string(use_diff=False).encode()).hexdigest(),
        "norms": {key: round(norm, 6) for key, norm in _norms(model)},
    }


def write_base(folder: Path, description: dict[str, Any]) -> None:
    """Write the description into an adapter folder."""
    write_json(folder / FILE, description)


def recorded_classes(folder: Path) -> tuple[str, ...] | None:
    """Return the classes that the adapter in `folder` tells apart; None for a language model's.

    Without a record (folders of PEFT) they are called by their numbers.

    Raises:
        UserError: when the record is damaged.
    """
    try:
        recorded = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return tuple(map(str, recorded["classes"])) if "classes" in recorded else None
    except FileNotFoundError:
        pass
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / FILE} is damaged ({error}): train again, or delete it to go without") from error
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / CONFIG_NAME}: not JSON ({error})") from None
    if not isinstance(config, dict) or config.get("task_type") != TaskType.SEQ_CLS:
        return None
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as tensors:
        shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118  (not a mapping)
    heads = [shape[0] for key, shape in shapes.items() if len(shape) == 2 and _is_head(key)]
    if not heads:
        raise UserError(f"the adapter in '{folder}' classifies, but holds no head ({' or '.join(HEADS)})")
    return tuple(str(number) for number in range(heads[-1]))


def check_base(model: PreTrainedModel, folder: Path) -> None:
    """Compare a base model with the one that the adapter in `folder` was trained on.

    Folders without a record (written by PEFT or by `save_pretrained`) pass; loading checks their shapes.
    Weights that differ in value alone are a warning: an adapter may be tried on a sibling of its base on purpose.

    Raises:
        UserError: when the architectures differ.
    """
    try:
        recorded = json.loads((folder / FILE).read_text(encoding="utf-8"))
        shape, norms, name = dict(recorded["shape"]), dict(recorded["norms"]), recorded["name"]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / FILE} is damaged ({error}): train again, or delete it to go without") from error
    config = model.config.get_text_config()
    for key, value in shape.items():
        if (now := getattr(config, key, None)) != value:
            raise UserError(
                f"the adapter in '{folder}' was trained on '{name}' with {key} {value}, "
                f"this base model has {now}: use '{name}'"
            )
    for key, norm in _norms(model):
        # Rounding weights to bfloat16 moves a norm by far less than this.
        if key in norms and abs(norm - norms[key]) > 0.01 * max(abs(norms[key]), 1e-6):
            warnings.warn(
                f"the adapter in '{folder}' was trained on '{name}'; this base model has other weights ({key})",
                stacklevel=2,
            )
            return


def _norms(model: PreTrainedModel) -> Iterator[tuple[str, float]]:
    """Yield (name, Euclidean norm of its first numbers) for a few parameters spread over the model."""
    named: list[tuple[str, Tensor]] = [(n, p) for n, p in _frozen(model) if not p.is_meta and p.dim() > 1]
    step = max(1, len(named) // SAMPLED_TENSORS)
    for name, parameter in named[::step][:SAMPLED_TENSORS]:
        yield name, float(torch.linalg.vector_norm(parameter.detach().flatten()[:SAMPLED_NUMBERS].float()))


def _frozen(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that adapters leave alone: all but those of a classification head."""
    head = {name for name, _ in head_parameters(model)}
    return ((name, parameter) for name, parameter in model.named_parameters() if name not in head)


def _is_head(key: str) -> bool:
    return any(f".{head}." in key for head in HEADS) and ".lora_" not in key
