"""Two blocks of a model, run for a moment: what one block costs in time and in memory kept for the backward pass.

A model of one block and a model of two, with random weights and the recipe's adapter on them, take the run's largest
batch forward and backward; the difference is one block. So the figures follow whatever adapters, kernels and device do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PretrainedConfig

from loraplex.batch_loss.labeled import IGNORED
from loraplex.cache import cache_disabled
from loraplex.compat.trl import put_fused_head
from loraplex.training.preparation import adapter_config, add_adapter, random_base
from loraplex.training.recipe import Recipe
from loraplex.tuner.config import AdapterConfig

# The smallest vocabulary that holds the tokens of the probe: the head is reckoned by itself.
VOCABULARY = 8
REPEATS = 3
# Keys of the adapter section that name single blocks, or what the probe has not: an objective may need more of them.
WHOLE_MODEL_KEYS = {
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "objective",
}


@dataclass(frozen=True)
class BlockCost:
    """One block of the model on one batch."""

    seconds: float
    """Forward and backward."""
    kept: int
    """Bytes kept for the backward pass."""
    kept_outside: int
    """Bytes kept once, before and after the blocks."""


def measure_block(
    recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype, kinds: list[str], lengths: Sequence[int]
) -> BlockCost:
    """Return the cost of one block with adapters on its modules `kinds`, for a batch of rows of these lengths."""
    standard = AdapterConfig()
    whole = {name: getattr(standard, name) for name in WHOLE_MODEL_KEYS}
    planned = adapter_config(recipe).allocation.given  # type: ignore[attr-defined]
    if planned is not None:
        # its sites are those of the whole model; here a block has all kinds, at their mean rank
        whole |= {
            "allocation": standard.allocation,
            "r": math.ceil(sum(planned.ranks.values()) / len(planned.adapted)),
        }
    recipe = replace(recipe, adapter=replace(recipe.adapter or standard, **whole, target_modules=kinds))
    seconds, kept = [], []
    for blocks in (1, 2):
        base = random_base(recipe, _shortened(config, blocks), dtype)
        torch.nn.Module.to(base, "cuda" if torch.cuda.is_available() else "cpu")
        if not recipe.model.classifies:
            # What SFTTrainer does to a model.
            put_fused_head(base, outputs=("log_probs", "entropy", "is_top1"))
        with cache_disabled():
            model = add_adapter(recipe, base).train()
        run = partial(_run, model, lengths, recipe.model.classifies)
        kept.append(run()[1])
        seconds.append(min(run()[0] for _ in range(REPEATS)))
    return BlockCost(max(seconds[1] - seconds[0], 1e-6), kept[1] - kept[0], max(0, 2 * kept[0] - kept[1]))


def _shortened(config: PretrainedConfig, blocks: int) -> PretrainedConfig:
    """Return a copy of a model's config with few blocks and tokens."""
    plain: dict[str, Any] = {key: value for key, value in config.to_dict().items() if not key.endswith("_token_id")}
    short = type(config).from_dict(plain)
    text = short.get_text_config()
    text.num_hidden_layers, text.vocab_size = blocks, VOCABULARY
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = kinds[:blocks]
    return short


def _run(model: PeftModel, lengths: Sequence[int], classifies: bool) -> tuple[float, int]:
    """Return the seconds of forward and backward and the bytes kept in between, weights not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long().to(model.device)
    batch: dict[str, Any] = {"input_ids": torch.zeros_like(mask), "attention_mask": mask}
    if classifies:
        batch["labels"] = torch.zeros(len(mask), dtype=torch.long, device=mask.device)
    else:
        batch |= {"labels": (mask - 1) * -IGNORED, "use_cache": False, "fused_lm_head": True}
    start = _now()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    return _now() - start, sum(kept.values())


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
