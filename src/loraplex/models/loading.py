"""Loading base models and tokenizers by name: an embedded one, a folder or a hub id. Errors are one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from loraplex.errors import UserError, nearest, remedy_here
from loraplex.models import embedded, encoder
from loraplex.models.packaged import packaged_dir
from loraplex.models.quiet import quiet

EMBEDDED, ENCODER = "embedded", "minilm"
PACKAGED = {EMBEDDED: embedded.MODEL, ENCODER: encoder.MODEL}
"""The models that come inside packages, by the name under which they are asked for."""
DType = Literal["auto", "bfloat16", "float32"]

# What transformers, the hub client and safetensors raise for a model that is absent, foreign or damaged.
_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, MemoryError)

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def resolve_model(name: str) -> str:
    """Return what transformers should load for `name`: a folder or a hub id.

    A name in `PACKAGED` becomes the folder of that model, made on first use; so does the folder it had on another
    machine, which adapters trained there name as their base.

    Raises:
        UserError: when `name` is a path and no folder with a model is there.
    """
    if name in PACKAGED:
        return str(packaged_dir(PACKAGED[name]))
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path)
        return str(path)
    for packaged in PACKAGED.values():
        if path.name == packaged.folder:
            return str(packaged_dir(packaged))
    if path.exists():
        raise UserError(f"model '{name}' is a file: give the folder that holds config.json and the weights")
    if _looks_like_path(name):
        raise UserError(f"model folder '{name}' does not exist: give a folder, a hub id, or '{EMBEDDED}'")
    if "/" not in name and nearest(name, PACKAGED):
        raise UserError(f"there is no model '{name}'.{nearest(name, PACKAGED)}")
    return name


def load_config(name: str) -> PretrainedConfig:
    """Return the configuration of the model `name`; no weights are read.

    Raises:
        UserError: when there is no such model, or its configuration cannot be read.
    """
    source = resolve_model(name)
    with _one_line("model", name), quiet():
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    assert isinstance(config, PretrainedConfig)
    return config


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model `name`; where it has no padding token, its end token pads.

    Padding therefore has to be masked by the attention mask, never by comparing token ids.

    Raises:
        UserError: when there is none, or it cannot be read.
    """
    source = resolve_model(name)
    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise UserError(f"model folder '{name}' has no tokenizer: save it there with tokenizer.save_pretrained")
    with _one_line("tokenizer", name), quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"the tokenizer of '{name}' has neither a padding nor an end token: set one and save it again"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, dtype: DType = "auto") -> PreTrainedModel:
    """Return the causal language model `name` in evaluation mode; "auto" keeps the data type of its weights.

    Raises:
        UserError: when there is no such model, it cannot be read, or its weights are incomplete.
    """
    model, missing = load_pretrained(AutoModelForCausalLM, name, dtype)
    # transformers would go on with random numbers in place of the tensors that are missing.
    if missing:
        backbone = f"{model.base_model_prefix}."
        remedy = "get it again"
        if not any(key.startswith(backbone) for key in missing):
            remedy = "get it again, or, if it is an encoder, set model.head to classification"
        raise UserError(f"model '{name}' lacks {len(missing)} of its weights, '{missing[0]}' for one: {remedy}")
    return model


def load_pretrained(cls: Any, name: str, dtype: DType, **config: Any) -> tuple[PreTrainedModel, list[str]]:
    """Return a model of one of transformers' Auto classes in evaluation mode, and the names of missing weights, sorted.

    `config` are values of its configuration. Missing weights hold random numbers.

    Raises:
        UserError: when there is no such model, or it cannot be read.
    """
    if dtype not in get_args(DType):
        known = ", ".join(get_args(DType))
        raise UserError(f"dtype '{dtype}' is not one of {known}.{nearest(str(dtype), get_args(DType))}")
    source = resolve_model(name)
    with _one_line("model", name), quiet():
        model, info = cls.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, output_loading_info=True, **config
        )
    assert isinstance(model, PreTrainedModel)
    return model, sorted(info["missing_keys"])


def _check_folder(path: Path) -> None:
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise UserError(f"'{path}' holds an adapter, not a model: give the model it was trained on")
    raise UserError(f"model folder '{path}' has no config.json: give the folder that transformers saved the model to")


def _looks_like_path(name: str) -> bool:
    """Whether `name` cannot be a hub id, which is "name" or "owner/name"."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name


@contextlib.contextmanager
def _one_line(what: str, name: str) -> Iterator[None]:
    """Turn what the user can mend into a UserError with the first sentence of the cause; nothing else is touched."""
    try:
        yield
    except _LOADING_ERRORS as error:
        remedy = remedy_here(error) or _remedy(error, name)
        if remedy is None:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot load the {what} '{name}': {lines[0].rstrip('.')}; {remedy}") from error


def _remedy(error: BaseException, name: str) -> str | None:
    """Return what to do about an error that the model is to blame for; None where something else is."""
    # transformers raises it for weights of another shape, and torch for whatever goes wrong in it.
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):
        return None
    if Path(name).expanduser().is_dir():
        return "check the folder"
    if isinstance(error, OSError):
        return f"check the name and the network, or use '{EMBEDDED}'"
    return "get it again, or choose a model that this version of transformers knows"
