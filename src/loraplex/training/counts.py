"""What a run counts of its rows and of its model: for its metrics, and in the lines that it says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import safe_open

from loraplex.allocation.plan import Plan
from loraplex.compat.peft import BaseTunerLayer
from loraplex.training.preparation import Rows, head_size
from loraplex.training.stock import allocates
from loraplex.tuner.counting import count_parameters
from loraplex.tuner.model import LoraplexTuner


def row_counts(rows: Rows) -> dict[str, int]:
    """Return the numbers of rows and of tokens that are trained on, and what became of rows that are too long."""
    return {
        "train": len(rows.train.rows),
        "truncated": rows.train.truncated,
        "dropped": rows.train.dropped,
        "validation": len(rows.validation.rows) if rows.validation else 0,
        "test": len(rows.test),
        "train_tokens": sum(len(row["input_ids"]) for row in rows.train.rows),
    }


def rows_line(rows: Rows) -> str:
    """Say the rows."""
    counts = row_counts(rows)
    words = {"truncated": "cut to length", "dropped": "dropped"}
    cut = [f"{counts[key]} {word}" for key, word in words.items() if counts[key]]
    losses = f" ({', '.join(cut)})" if cut else ""
    return f"{counts['train']:,} to train on{losses}, {counts['test']:,} to test on"


def open_ranks(model: PeftModel) -> Plan | None:
    """Return the ranks as they are now, closed ones not counted; None for adapters that are not loraplex's own."""
    if not isinstance(model.base_model, LoraplexTuner):
        return None
    layers = model.base_model.adapter_layers(model.active_adapter)
    return Plan({layer.site: layer.adapter(model.active_adapter).factors.open_ranks for layer in layers})


def parameter_counts(model: PeftModel) -> dict[str, Any]:
    """Return the numbers of adapted sites and of parameters: trained ones, those of the head, all."""
    trainable, total = model.get_nb_trainable_parameters()
    plan = open_ranks(model)
    sites = sum(isinstance(module, BaseTunerLayer) for module in model.modules()) if plan is None else len(plan.adapted)
    head = {"head": size} if (size := head_size(model)) else {}
    return {"sites": sites, "trainable": trainable, **head, "total": total, "share": trainable / total}


def parameters_line(model: PeftModel, counts: Mapping[str, Any]) -> str:
    """Say the parameters, and what an allocation may keep of them."""
    head = f" ({counts['head']:,} of them its head)" if "head" in counts else ""
    line = "{sites} sites, {trainable:,} trainable parameters{of_head}, {share:.2%} of the model".format(
        **counts, of_head=head
    )
    counted = count_parameters(model)
    return line if counted.budget is None else f"{line}; {counted}"


def deployed_parameters(model: PeftModel, adapter: Path) -> int:
    """Return how many of the trained parameters are left after an allocation, ours or PEFT's: closed ranks are not."""
    if not allocates(model):
        return count_parameters(model).open
    # PEFT's live modules keep the ranks that it masks, its file does not
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        names = file.keys()
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)
