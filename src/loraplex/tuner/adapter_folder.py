"""The folder of an adapter, read with suspicion: config against its schema, safetensors only, finite numbers only."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from loraplex.compat.peft import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from loraplex.errors import UserError, remedy_here
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.options import LoraplexType, refuse_unknown


def local_folder(path: str, subfolder: str | None = None, **hub: Any) -> Path:
    """Return the folder with the adapter's two files, downloaded first when `path` is a hub id.

    Raises:
        UserError: when there is no such folder or hub id, or one of the files is missing or of the wrong kind.
    """
    folder = Path(path) / (subfolder or "")
    if folder.is_file():
        raise UserError(f"'{folder}' is a file: give the folder that holds {CONFIG_NAME} and the weights")
    if not folder.is_dir():
        try:
            files = [
                hf_hub_download(path, n, subfolder=subfolder, **hub) for n in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
            ]
        except HFValidationError:
            raise UserError(
                f"no adapter folder or hub id '{path}': no such folder, and a hub id is NAME or OWNER/NAME"
            ) from None
        except (OSError, ValueError, HfHubHTTPError) as error:
            reason = str(error).strip().split("\n")[0]
            if (remedy := remedy_here(error)) is not None:
                raise UserError(f"cannot fetch the adapter '{path}': {reason}; {remedy}") from error
            raise UserError(f"no adapter folder or hub id '{path}': {reason}") from None
        folder = Path(files[0]).parent
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"'{folder}' holds no adapter: {CONFIG_NAME} is missing")
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        if (folder / WEIGHTS_NAME).is_file():
            raise UserError(
                f"'{folder}' has {WEIGHTS_NAME}, a pickle, which can run code: save it as safetensors with peft"
            )
        raise UserError(f"'{folder}' lacks {SAFETENSORS_WEIGHTS_NAME}: the adapter's weights are missing")
    return folder


def read_config(folder: Path) -> AdapterConfig:
    """Return the config of one of our adapters, or of a stock LoRA or DoRA.

    Raises:
        UserError: when it is not valid, has an unknown key, or uses what loraplex does not represent.
    """
    file = folder / CONFIG_NAME
    try:
        values = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not JSON ({error})") from None
    kind = values.get("peft_type") if isinstance(values, dict) else None
    try:
        if kind == LoraplexType.LORAPLEX:
            config: Any = AdapterConfig.from_pretrained(str(folder))
            assert isinstance(config, AdapterConfig)
            return config
        if kind == "LORA":
            # what a later PEFT has added and left off does not matter
            refuse_unknown(
                (key for key, value in values.items() if value), {entry.name for entry in fields(LoraConfig)}
            )
            known = {entry.name for entry in fields(LoraConfig)}
            return AdapterConfig.from_peft(LoraConfig.from_peft_type(**{k: v for k, v in values.items() if k in known}))
    except (TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a valid config: {error}") from None
    raise UserError(f"{folder} is a {kind} adapter: loraplex loads its own and PEFT's LORA")


def check_weights(folder: Path, *, allow_nonfinite: bool = False) -> None:
    """Check that the file of weights is whole and finite.

    Raises:
        UserError: when it is truncated or not safetensors, or a tensor holds NaN or infinity.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a mapping)
                if not allow_nonfinite and not torch.isfinite(tensors.get_tensor(key)).all():
                    raise UserError(
                        f"'{key}' in {file} holds NaN or infinity: pass allow_nonfinite=True to load it nevertheless"
                    )
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or not a safetensors file ({error}): copy it again") from None
