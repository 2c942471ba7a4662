"""How engines that batch many adapters read a LoRA folder, written down anew as vLLM's loader does it.

One scale for the whole file, alpha/r (alpha/√r with rsLoRA), from two numbers of the config; `rank_pattern` and
`alpha_pattern` are not looked at. Tensors are found by their names. DoRA, biases and whole modules are refused, and so
is a rank above the largest `max_lora_rank`. A file that is right under this rule is right under PEFT's, not vice versa.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from loraplex.compat.peft import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from loraplex.errors import UserError
from loraplex.tuner.file_tensors import PREFIX

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank takes (1 left aside); buffers of this size are made for every adapter."""


def engine_rank(rank: int) -> int | None:
    """Return the smallest rank of an engine's buffers that holds `rank`, None when there is none."""
    return next((size for size in RANKS if size >= rank), None)


def read_as_engine(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A (r, in) and B (out, r), scaled, by full module name, as an engine reads them from a LoRA folder.

    Raises:
        UserError: when an engine would refuse the folder.
    """
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    for key, accepted in (("use_dora", False), ("modules_to_save", None), ("bias", "none")):
        if config.get(key, accepted) != accepted:
            raise UserError(f"engines refuse an adapter with {key}={config[key]!r}")
    r = int(config["r"])
    scale = float(config["lora_alpha"]) / (math.sqrt(r) if config.get("use_rslora") else r)
    if engine_rank(r) is None:
        raise UserError(f"engines refuse rank {r}: {RANKS[-1]} is the largest they hold")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / SAFETENSORS_WEIGHTS_NAME).items():
        parts = key.removeprefix(PREFIX).split(".")
        if parts[-2] not in ("lora_A", "lora_B") or parts[-1] != "weight":
            raise UserError(f"engines know no tensor '{key}'")
        halves.setdefault(".".join(parts[:-2]), {})[parts[-2]] = tensor.float()
    pairs = {site: (found["lora_A"], found["lora_B"] * scale) for site, found in halves.items()}
    for site, (a, b) in pairs.items():
        if not len(a) == b.shape[1] <= r:
            raise UserError(f"engines read {site} with rank {r}, its tensors have {len(a)} and {b.shape[1]}")
    return pairs
