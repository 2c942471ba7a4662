"""Accuracy of a model on the test rows of a recipe, by the kind of scoring that the rows allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from loraplex.data import Example
from loraplex.errors import UserError
from loraplex.evaluation.answer_loss import score_answer_loss
from loraplex.evaluation.classes import score_classes
from loraplex.evaluation.generation import LLM_ADAPTERS, Decoding, score_generation
from loraplex.evaluation.options import score_options
from loraplex.evaluation.results import Accuracies, majority_share, write_records
from loraplex.models.classifier import classes_of
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
        if "f1" in self.summary:
            text += f", F1 {self.summary['f1']:.3f}"
        if per_task := self.summary["per_task"]:
            text += ", mean of {} tasks {value:.3f} ± {standard_error:.3f}".format(
                len(per_task), **self.summary["macro"]
            )
        if loss := self.summary.get("answer_loss"):
            text += ", answer loss {value:.3f} ± {standard_error:.3f} on {items} items without options".format(**loss)
        if self.summary.get("unparsable"):
            text += f", {self.summary['unparsable']:.1%} of the answers unreadable"
        return text


def kind_of(examples: Sequence[Example], options: EvaluationOptions) -> str:
    """Return how the examples are scored: as the options say, or for "auto" as the rows allow."""
    if options.kind != "auto":
        return options.kind
    with_choices = sum(bool(example.choices) for example in examples)
    return "generation" if not with_choices else "choices" if with_choices == len(examples) else "mixed"


def items_of_accuracy(examples: Sequence[Example], options: EvaluationOptions) -> int:
    """Return how many of the examples count in the accuracy: those without options do not when others have them."""
    if kind_of(examples, options) != "mixed":
        return len(examples)
    return sum(bool(example.choices) for example in examples)


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    options: EvaluationOptions,
    progress: bool = False,
) -> Measured:
    """Return the accuracy of `model` on `examples`; rows with choices are scored by them unless `kind` says otherwise.

    Where some rows have choices and some do not, the others get the loss of their answer: it is reported beside the
    accuracy and is no part of it. A model with a classification head is asked for the class.

    Raises:
        UserError: when the rows or the model do not allow the kind of scoring asked for.
    """
    if (classes := classes_of(model)) is not None:
        return _measure_classes(model, tokenizer, examples, classes, options, progress)
    kind = kind_of(examples, options)
    if kind == "mixed":
        return _measure_mixed(model, tokenizer, examples, options, progress)
    size = options.batch_size
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


def _measure_classes(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    classes: Sequence[str],
    options: EvaluationOptions,
    progress: bool,
) -> Measured:
    if options.kind not in ("auto", "choices"):
        raise UserError(f"evaluation.kind is '{options.kind}', but the model has a classification head: leave it out")
    scores = score_classes(model, tokenizer, examples, classes, batch_size=options.batch_size, progress=progress)
    return Measured(_summary("classes", scores.accuracies(), examples, {"f1": scores.f1()}), scores.records())


def _measure_mixed(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    options: EvaluationOptions,
    progress: bool,
) -> Measured:
    with_choices = [example for example in examples if example.choices]
    others = [example for example in examples if not example.choices]
    if not with_choices:
        raise UserError(
            f"evaluation.kind is 'mixed', but none of the {len(examples)} rows has options: set it to generation"
        )
    found = measure(model, tokenizer, with_choices, replace(options, kind="choices"), progress)
    if not others:
        return found
    scores = score_answer_loss(model, tokenizer, others, batch_size=options.batch_size, progress=progress)
    per_task = {task: asdict(loss) for task, loss in scores.per_task.items()}
    loss = {**asdict(scores.overall), "per_task": per_task}
    return Measured({**found.summary, "kind": "mixed", "answer_loss": loss}, found.records + scores.records())


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
