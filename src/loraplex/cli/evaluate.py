"""`loraplex eval`: how often an adapter, or its bare base model, is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.cli.arguments import Parser, WrongUsageError, add_keys, in_words_of, section
from loraplex.cli.keys import known_key
from loraplex.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping

    from rich.console import RenderableType
    from torch import nn
    from transformers import PreTrainedTokenizerBase

BARE = "none"
DESCRIPTION = """Measure the accuracy of ADAPTER, with standard errors.

ADAPTER is an adapter folder, a run folder, a hub id, or 'none' for a base model without adapter."""

KEYS = {
    "--data": "data.test",
    "--format": "data.format",
    "--prompt": "data.prompt",
    "--second": "data.second",
    "--completion": "data.completion",
    "--choice": "data.choices",
    "--answer": "data.answer",
    "--chat": "data.chat",
    "--task": "data.task",
    "--config": "data.config",
    "--split": "data.test_split",
    "--limit": "data.max_test",
    "--per-task": "data.max_test_per_task",
    "--test-share": "data.test_share",
    "--seed": "data.seed",
    "--kind": "evaluation.kind",
    "--normalize": "evaluation.normalize",
    "--max-new-tokens": "evaluation.max_new_tokens",
    "--batch-size": "evaluation.batch_size",
    "--dtype": "model.dtype",
}
CHANGED: dict[str, dict[str, Any]] = {
    "--data": {
        "help": "Test rows: file, hub id, builtin:NAME or benchmark:FILE; may be given several times.",
    },
    "--test-share": {"help": "Only the items that data.test_share of a recipe held out."},
    "--kind": {"choices": tuple(kind for kind in known_key("evaluation.kind").choices if kind != "none")},
    "--dtype": {"help": "Of the base model's weights.", "default": "auto"},
}


def parser(prog: str) -> Parser:
    """Return the parser of the command line."""
    made = Parser(prog, DESCRIPTION)
    made.add_argument("adapter", metavar="ADAPTER")
    add_keys(made, KEYS, CHANGED)
    made.add_argument("--model", help="Base model instead of the one named in the adapter folder.")
    made.add_argument(
        "--base", action="store_true", help="Leave the adapter off: the same rows for the bare base model."
    )
    made.add_argument(
        "--lm-eval", metavar="TASKS", help="Run these lm-evaluation-harness tasks, separated by commas, instead."
    )
    made.add_argument("--output", type=Path, metavar="FOLDER", help="Where to write metrics.json and items.jsonl.")
    made.add_argument(
        "--overwrite", action="store_true", help="Replace what an earlier evaluation left in the output folder."
    )
    made.add_argument("--quiet", action="store_true", help="No progress bar.")
    return made


def run(arguments: Namespace) -> None:
    """Measure, print, and write where that was asked for."""
    output: Path | None = arguments.output
    if bool(section(arguments, "data")["test"]) == bool(arguments.lm_eval):
        raise WrongUsageError("give either --data or --lm-eval")
    if output is not None:
        _check_output(output, arguments.overwrite)
    with in_words_of(KEYS):
        result, records = _run_harness(arguments) if arguments.lm_eval else _score(arguments)
    if output is not None:
        _write(output, result, records)
        print(f"written to {output}")


def _score(arguments: Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the rows, print the accuracies, and return them with the items."""
    from loraplex.data import DataOptions, read_examples
    from loraplex.training.measuring import measure
    from loraplex.training.recipe import EvaluationOptions

    data, how = section(arguments, "data"), EvaluationOptions(**section(arguments, "evaluation"))
    sources = data["test"]
    if data["test_share"]:
        data["train"] = data.pop("test")
    if how.kind == "labels" and data["format"] == "auto":
        data["format"] = "commonsense-labels"
    options = DataOptions(**data)
    # Rows first: a mistake in them shows in a second, a model may take minutes to load.
    examples = read_examples(options, "test")
    model, tokenizer, name = _load(arguments)
    measured = measure(model, tokenizer, examples, how, progress=not arguments.quiet)
    _print_table(measured.summary)
    header = {"adapter": _adapter_in_words(arguments), "model": name, "data": list(sources)}
    return {**header, **measured.summary}, measured.records


def _run_harness(arguments: Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run tasks of the lm-evaluation-harness, print their metrics, and return them; there are no items."""
    from rich.console import Console
    from rich.table import Table

    from loraplex.evaluation.harness import run_harness
    from loraplex.tuner.adapted_model import refuse_classifier

    if arguments.adapter != BARE:
        refuse_classifier(arguments.adapter, "--lm-eval")
    model, tokenizer, name = _load(arguments)
    tasks = [task.strip() for task in arguments.lm_eval.split(",") if task.strip()]
    size, limit = section(arguments, "evaluation")["batch_size"], section(arguments, "data")["max_test"]
    results = run_harness(model, tokenizer, tasks, batch_size=size, limit=limit)
    table = Table("task", "metric", "value")
    for task, metrics in results.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                table.add_row(task, metric, f"{value:.4f}")
    Console().print(table)
    header = {"adapter": _adapter_in_words(arguments), "model": name}
    return {**header, "lm_eval": results}, []


def _load(arguments: Namespace) -> tuple[nn.Module, PreTrainedTokenizerBase, str]:
    """Return the model with or without its adapter, its tokenizer, and the name of the base."""
    import torch

    from loraplex.models.loading import EMBEDDED, load_model, load_tokenizer
    from loraplex.tuner.adapted_model import base_name, load_adapted, refuse_classifier

    adapter, dtype = arguments.adapter, section(arguments, "model")["dtype"]
    name = arguments.model or (EMBEDDED if adapter == BARE else base_name(adapter))
    tokenizer = load_tokenizer(name)
    if adapter != BARE and not arguments.base:
        return load_adapted(adapter, name, dtype), tokenizer, name
    if adapter != BARE:
        refuse_classifier(adapter, "--base")
    model: nn.Module = load_model(name, dtype)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return (model if accelerator is None else model.to(accelerator)), tokenizer, name


def _print_table(summary: Mapping[str, Any]) -> None:
    """Print the accuracy of every task, of all items, and the share that needs no skill."""
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "items", "accuracy", "± standard error")
    rows = dict(summary["per_task"])
    if rows:
        rows["mean of tasks"] = summary["macro"]
    rows["all items"] = {key: summary[key] for key in ("value", "standard_error", "items")}
    for task, accuracy in rows.items():
        table.add_row(task or "-", str(accuracy["items"]), *(f"{accuracy[k]:.3f}" for k in ("value", "standard_error")))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"always the most frequent answer: {summary['majority_share']:.3f}")
    for way, title in (("sum", "summed"), ("characters", "per character")):
        if way in summary:
            accuracy = summary[way]
            console.print(f"{title} log-likelihood: {accuracy['value']:.3f} ± {accuracy['standard_error']:.3f}")
    if "answer_loss" in summary:
        console.print(_loss_table(summary["answer_loss"]))
    if "f1" in summary:
        console.print(f"F1: {summary['f1']:.3f}")
    if "unparsable" in summary:
        console.print(f"answers in which nothing was found: {summary['unparsable']:.3f}")


def _loss_table(loss: Mapping[str, Any]) -> RenderableType:
    """Return the loss of the answers of items without options, by task; it is no part of any accuracy."""
    from rich.table import Table

    table = Table("task", "items", "answer loss", "± standard error")
    table.caption, table.caption_justify = "items without options: nats per token of the right answer", "left"
    for task, values in loss["per_task"].items():
        table.add_row(task or "-", str(values["items"]), *(f"{values[key]:.3f}" for key in ("value", "standard_error")))
    return table


def _adapter_in_words(arguments: Namespace) -> str | None:
    return None if arguments.base or arguments.adapter == BARE else arguments.adapter


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"output '{output}' is a file: give a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"output '{output}' is not empty: --overwrite replaces an earlier evaluation in it")


def _write(output: Path, result: Mapping[str, Any], records: list[dict[str, Any]]) -> None:
    from loraplex.evaluation.results import write_records

    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2, ensure_ascii=False, default=str)
    (output / "metrics.json").write_text(text + "\n", encoding="utf-8")
    if records:
        write_records(output / "items.jsonl", records)
