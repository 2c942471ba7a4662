"""Accuracy of a model on the test rows of a recipe, by the kind of scoring that the rows allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from loraplex.data import Example
from loraplex.evaluation import (
    LLM_ADAPTERS,
    Accuracies,
    Decoding,
    majority_share,
    score_generation,
    score_options,
    write_records,
)
from loraplex.training.recipe import EvaluationOptions


@dataclass(frozen=True)
class Measured:
    """Accuracies with standard errors and the items behind them."""

    summary: dict[str, Any]
    records: list[dict[str, Any]]

    def write(self, path: Path) -> None:
        """Write one JSON object per item."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_records(path, self.records)

    def __str__(self) -> str:
        text = "accuracy {value:.3f} ± {standard_error:.3f} on {items} items".format(**self.summary)
        if self.summary.get("unparsable"):
            text += f", {self.summary['unparsable']:.1%} of the answers unreadable"
        return text


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    options: EvaluationOptions,
    progress: bool = False,
) -> Measured:
    """Return the accuracy of `model` on `examples`; rows with choices are scored by them unless `kind` says otherwise.

    Raises:
        UserError: when the rows do not allow the kind of scoring asked for.
    """
    kind = options.kind
    if kind == "auto":
        kind = "choices" if all(example.choices for example in examples) else "generation"
    size = options.items_at_once
    extra: dict[str, Any]
    if kind == "choices":
        scores = score_options(
            model, tokenizer, examples, batch_size=size, normalize=options.normalize, progress=progress
        )
        ways = {way: asdict(scores.accuracies(way).overall) for way in ("sum", "characters")}
        accuracies, records, extra = scores.accuracies(), scores.records(), {"normalize": options.normalize, **ways}
    else:
        match: Literal["exact", "labels"] = "labels" if kind == "labels" else "exact"
        decoding = LLM_ADAPTERS if match == "labels" else Decoding()
        if options.max_new_tokens is not None:
            decoding = Decoding(decoding.num_beams, options.max_new_tokens)
        answers = score_generation(
            model, tokenizer, examples, match=match, decoding=decoding, batch_size=size, progress=progress
        )
        accuracies, records, extra = answers.accuracies(), answers.records(), {"unparsable": answers.unparsable}
    return Measured(_summary(kind, accuracies, examples, extra), records)


def _summary(kind: str, accuracies: Accuracies, examples: Sequence[Example], extra: dict[str, Any]) -> dict[str, Any]:
    """Return plain values for metrics.json."""
    per_task = {task: asdict(accuracy) for task, accuracy in accuracies.per_task.items()}
    return {
        "kind": kind,
        **asdict(accuracies.overall),
        "majority_share": majority_share(examples),
        "per_task": per_task if len(per_task) > 1 else {},
        "macro": asdict(accuracies.macro),
        **extra,
    }
