"""A routed adapter as plain LoRA, an approximation: every gate at its mean over calibration rows, B̄ = Σ_i ḡ_i B_i.

Not from the HydraLoRA paper (arXiv 2404.19245), whose heads cannot be merged. It is exact only where the gates do not
depend on the token, so what it loses is measured on rows that were not calibrated on.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from loraplex.adapters.registry import Capability
from loraplex.data import DataOptions, Example, read_examples
from loraplex.data.tokenization import tokenize
from loraplex.errors import UserError
from loraplex.evaluation.options import score_options
from loraplex.evaluation.results import Accuracy
from loraplex.export.subject import ExportCandidate
from loraplex.export.verification import LONGEST
from loraplex.models.agreement import Agreement, compare, model_logits
from loraplex.tuner.building import build_adapter
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.model import LoraplexTuner
from loraplex.tuner.routing import measure_routing, overview

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StaticGates:
    """What the gates are averaged over."""

    data: DataOptions
    """Its test rows are the calibration rows."""
    task: str | None = None
    """Only rows of this task; all when absent."""

    def examples(self) -> list[Example]:
        """Return the calibration rows.

        Raises:
            UserError: when they cannot be read, or none is of the task.
        """
        return of_task(read_examples(self.data, "test"), self.task, "calibration")


@dataclass(frozen=True)
class Approximation:
    """What fixing the gates has changed."""

    rows: int
    """Calibration rows."""
    tokens: int
    entropy: float
    """Of the gates on the calibration rows, mean over the sites; 1 is even."""
    agreement: Agreement
    """Routed against fixed, on rows that were not calibrated on."""
    accuracy: tuple[Accuracy, Accuracy] | None
    """Routed and fixed, on those rows that have options."""

    def sentences(self) -> list[str]:
        """Return what to tell the user."""
        said = [
            f"gates at their means over {self.rows} rows, {self.tokens:,} tokens; entropy {self.entropy:.0%} of even",
            f"against the routed adapter, {self.agreement}",
        ]
        if self.accuracy is not None:
            routed, fixed = self.accuracy
            said.append(
                f"accuracy {fixed} instead of {routed} on {routed.items} items: {fixed.value - routed.value:+.3f}"
            )
        return said


def refuse_static(subject: ExportCandidate) -> str | None:
    """Return why there is no gate to fix, None where there is one."""
    if Capability.ROUTED in subject.adapter.methods[0].provides:
        return None
    return f"'{subject.name}' has no gates over heads, so there is nothing to fix: leave --static-gates out"


def static_config(config: AdapterConfig) -> AdapterConfig:
    """Return the config of the plain LoRA that fixed gates leave: the same sites and ranks, scale 1."""
    fixed = copy(config)
    fixed.adapter = AdapterConfig().adapter
    fixed.lora_alpha, fixed.alpha_pattern = config.r, dict(config.rank_pattern)
    fixed.lora_dropout, fixed.seed = 0.0, 0
    return fixed


def fix_gates(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Sequence[Example],
    rows: Sequence[Sequence[int]],
    held_out: Sequence[Example] = (),
) -> Approximation:
    """Put plain LoRA in the place of the active routed adapter, and return what that changed.

    `rows` are token ids to compare logits on; accuracies are compared on those of `held_out` that have options.

    Raises:
        UserError: when the calibration rows give no tokens.
    """
    items = [example for example in held_out if example.choices]
    before = model_logits(model, rows)
    routed = score_options(model, tokenizer, items).accuracies().overall if items else None
    tokens = [row["input_ids"][:LONGEST] for row in tokenize(calibration, tokenizer).rows]
    gates = measure_routing(model, tokens)
    _replace(model, {site: torch.tensor(summary.load) for site, summary in gates.items()})
    agreement = compare("fixed gates", before, model_logits(model, rows), inf)
    fixed = score_options(model, tokenizer, items).accuracies().overall if items else None
    return Approximation(
        rows=len(tokens),
        tokens=sum(map(len, tokens)),
        entropy=overview(gates)["router_entropy"],
        agreement=agreement,
        accuracy=None if routed is None or fixed is None else (routed, fixed),
    )


@torch.no_grad()
def _replace(model: PeftModel, gates: dict[str, torch.Tensor]) -> None:
    tuner, name = model.base_model, model.active_adapter
    assert isinstance(tuner, LoraplexTuner)
    config = tuner.peft_config[name]
    assert isinstance(config, AdapterConfig)
    tuner.peft_config[name] = fixed = static_config(config)
    for layer in tuner.site_layers():
        if name not in layer.loraplex_adapters:
            continue
        adapter = layer.adapter(name)
        a, b = adapter.combine.collapsed(adapter.factors, gates[layer.site])
        plain = build_adapter(layer, layer.site, fixed, None).to(a.device, a.dtype)
        tensors = plain.factors.state_dict(keep_vars=True)
        for key, value in {"lora_A": a, "lora_B": b, "gate": adapter.factors.gate}.items():
            tensors[key].copy_(value)
        layer.loraplex_adapters[name] = plain.train(layer.training)


def of_task(examples: list[Example], task: str | None, what: str) -> list[Example]:
    """Return the rows of a task, all of them where `task` is None or no row has one.

    Raises:
        UserError: when other tasks have rows and this one has none.
    """
    if task is None or not any(example.task for example in examples):
        return examples
    chosen = [example for example in examples if example.task == task]
    if not chosen:
        raise UserError(f"no {what} row is of task '{task}': give rows of it, or rows without tasks")
    return chosen


def tasks_of(static: StaticGates) -> list[str]:
    """Return the tasks of the calibration rows in the order in which they appear.

    Raises:
        UserError: when some row has none.
    """
    tasks = list(dict.fromkeys(example.task for example in static.examples()))
    if "" in tasks:
        raise UserError("--per-task needs a 'task' in every calibration row: add the field, or leave --per-task out")
    return tasks
