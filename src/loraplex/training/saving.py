"""The adapter folder: written elsewhere, reloaded, compared with the model in memory, and only then put in place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.adapters.registry import SaveFormat
from loraplex.files import fill_atomically
from loraplex.models.agreement import model_logits
from loraplex.models.fingerprint import write_base
from loraplex.training.reloading import Reload, checked, site_differences
from loraplex.tuner.adapter_loading import load_adapter
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.peft_format import save_peft_format

COMPARED_ROWS = 4


def save_checked(
    model: PeftModel,
    folder: Path,
    rows: Sequence[Sequence[int]],
    base: dict[str, Any],
    fresh_base: Callable[[], PreTrainedModel],
) -> tuple[PeftModel, Reload]:
    """Save `model`'s adapter to `folder` and return it reloaded on `fresh_base()`, with the comparison.

    PEFT's own tuner reloads it where it has a form that PEFT knows, ours where it has none. `rows` are token ids to
    compute logits on, `base` the record of the base model. Until the comparison has passed nothing stands at `folder`,
    or what stood there before.

    Raises:
        UserError: when the reloaded adapter does not compute what the trained one does.
    """
    rows = rows[:COMPARED_ROWS]
    result: list[tuple[PeftModel, Reload]] = []

    def fill(temporary: Path) -> None:
        model.save_pretrained(str(temporary))
        write_base(temporary, base)
        # PEFT's model card is a form with nothing filled in.
        (temporary / "README.md").unlink(missing_ok=True)
        result.append(_reload(model, temporary, rows, fresh_base()))

    fill_atomically(folder, fill)
    return result[0]


def _reload(
    model: PeftModel, folder: Path, rows: Sequence[Sequence[int]], fresh: PreTrainedModel
) -> tuple[PeftModel, Reload]:
    """Return the adapter in `folder` on `fresh`, and how it compares with `model`."""
    trained, dtype = _logits(model, rows), fresh.dtype
    config = model.peft_config[model.active_adapter]
    if not isinstance(config, AdapterConfig):
        stock = _evaluating(PeftModel.from_pretrained(fresh, str(folder)))
        return stock, checked(trained, None, _logits(stock, rows), [], dtype, is_exact=False)
    ours = _evaluating(load_adapter(fresh, str(folder)))
    again = _logits(ours, rows)
    # Compaction folds the scale into B, which rounds.
    is_exact = config.state.finished_ranks is None
    if config.adapter.peft_format is SaveFormat.OWN or config.has_shortcuts:
        return ours, checked(trained, again, None, [], dtype, is_exact)
    stock = _by_stock_peft(ours.unload(), model, config, folder)
    sites = list(site_differences(model, stock))
    return stock, checked(trained, again, _logits(stock, rows), sites, dtype, is_exact)


def _by_stock_peft(fresh: torch.nn.Module, model: PeftModel, config: AdapterConfig, folder: Path) -> PeftModel:
    """Return the adapter on `fresh` under PEFT's own tuner: the folder's, or its pairs written out as plain LoRA."""
    with tempfile.TemporaryDirectory() as plain:
        if config.save_format is not config.adapter.peft_format:
            save_peft_format(model, plain, model.active_adapter)
            folder = Path(plain)
        return _evaluating(PeftModel.from_pretrained(fresh, str(folder)))


def _evaluating(model: PeftModel) -> PeftModel:
    model.eval()
    return model


def _logits(model: PeftModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    was_training = model.training
    logits = model_logits(_evaluating(model), rows)
    model.train(was_training)
    return logits
