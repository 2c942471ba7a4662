"""`loraplex eval`: how often an adapter, or its bare base model, is right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraplex.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import RenderableType
    from torch import nn
    from transformers import PreTrainedTokenizerBase

BARE = "none"

_FORMATS = ["auto", "completion", "messages", "alpaca", "choices", "template", "commonsense", "commonsense-labels"]


@click.command("eval")
@click.argument("adapter")
@click.option("--data", "sources", multiple=True, help="Test rows: file, hub id, builtin:NAME or benchmark:FILE.")
@click.option("--format", "form", type=click.Choice(_FORMATS), default="auto", show_default=True, help="Their form.")
@click.option("--prompt", help="Template form: the prompt, with {field} for a field of the row.")
@click.option("--second", help="Template form, for adapters with a classification head: the other text of a pair.")
@click.option("--completion", help="Template form: the right completion, for rows without options.")
@click.option("--choice", "choices", multiple=True, help="Template form: an option, usually with a leading space.")
@click.option("--answer", default="answer", show_default=True, help="Template form: the field with the right option.")
@click.option("--chat", is_flag=True, help="Ask text prompts through the tokenizer's chat template.")
@click.option("--task", default="", help="The task of rows that name none: boolq, piqa, ...")
@click.option("--config", help="Hub data set: its configuration.")
@click.option("--split", default="test", show_default=True, help="Hub data set: its split.")
@click.option("--limit", type=click.IntRange(min=1), help="Rows of each source at most, a seeded sample.")
@click.option("--per-task", type=click.IntRange(min=1), help="Rows of each task of a source at most, a seeded sample.")
@click.option("--test-share", type=float, default=0.0, help="Only the items that data.test_share of a recipe held out.")
@click.option("--seed", default=0, show_default=True, help="Decides the sample and the items of a built-in task.")
@click.option(
    "--kind",
    type=click.Choice(["auto", "choices", "mixed", "generation", "labels"]),
    default="auto",
    show_default=True,
    help="Compare options by likelihood (mixed: with the loss of the answer where a row has no options), match a "
    "greedy answer exactly, or look for a label (LLM-Adapters).",
)
@click.option("--normalize", type=click.Choice(["sum", "characters"]), default="sum", show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest generated answer.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Items at once.")
@click.option("--model", help="Base model instead of the one named in the adapter folder.")
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto", show_default=True)
@click.option("--base", is_flag=True, help="Leave the adapter off: the same rows for the bare base model.")
@click.option("--lm-eval", "harness_tasks", metavar="TASKS", help="Run these lm-evaluation-harness tasks instead.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for metrics.json and items.jsonl.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier evaluation left in the output folder.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def evaluate(**arguments: Any) -> None:
    """Measure the accuracy of ADAPTER, with standard errors.

    ADAPTER is an adapter folder, a run folder, a hub id, or 'none' for a base model without adapter.
    """
    output: Path | None = arguments["output"]
    if bool(arguments["sources"]) == bool(arguments["harness_tasks"]):
        raise click.UsageError("give either --data or --lm-eval")
    if output is not None:
        _check_output(output, arguments["overwrite"])
    result, records = _run_harness(arguments) if arguments["harness_tasks"] else _score(arguments)
    if output is not None:
        _write(output, result, records)
        click.echo(f"written to {output}")


def _score(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the rows, print the accuracies, and return them with the items."""
    from loraplex.data import DataOptions, read_examples
    from loraplex.training.measuring import measure
    from loraplex.training.recipe import EvaluationOptions

    form, kind = arguments["form"], arguments["kind"]
    if kind == "labels" and form == "auto":
        form = "commonsense-labels"
    options = DataOptions(
        **{"train" if arguments["test_share"] else "test": arguments["sources"]},
        test_share=arguments["test_share"],
        max_test_per_task=arguments["per_task"],
        format=form,
        prompt=arguments["prompt"],
        second=arguments["second"],
        completion=arguments["completion"],
        choices=arguments["choices"],
        answer=arguments["answer"],
        chat=arguments["chat"],
        task=arguments["task"],
        config=arguments["config"],
        test_split=arguments["split"],
        max_test=arguments["limit"],
        seed=arguments["seed"],
    )
    # Rows first: a mistake in them shows in a second, a model may take minutes to load.
    examples = read_examples(options, "test")
    model, tokenizer, name = _load(arguments)
    how = EvaluationOptions(
        kind=kind,
        normalize=arguments["normalize"],
        items_at_once=arguments["batch_size"],
        max_new_tokens=arguments["max_new_tokens"],
    )
    measured = measure(model, tokenizer, examples, how, progress=not arguments["quiet"])
    _print_table(measured.summary)
    header = {"adapter": _adapter_in_words(arguments), "model": name, "data": list(arguments["sources"])}
    return {**header, **measured.summary}, measured.records


def _run_harness(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run tasks of the lm-evaluation-harness, print their metrics, and return them; there are no items."""
    from rich.console import Console
    from rich.table import Table

    from loraplex.evaluation.harness import run_harness
    from loraplex.models.adapted import refuse_classifier

    if arguments["adapter"] != BARE:
        refuse_classifier(arguments["adapter"], "--lm-eval")
    model, tokenizer, name = _load(arguments)
    tasks = [task.strip() for task in arguments["harness_tasks"].split(",") if task.strip()]
    how = {"batch_size": arguments["batch_size"], "limit": arguments["limit"]}
    results = run_harness(model, tokenizer, tasks, **how)
    table = Table("task", "metric", "value")
    for task, metrics in results.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                table.add_row(task, metric, f"{value:.4f}")
    Console().print(table)
    header = {"adapter": _adapter_in_words(arguments), "model": name}
    return {**header, "lm_eval": results}, []


def _load(arguments: Mapping[str, Any]) -> tuple[nn.Module, PreTrainedTokenizerBase, str]:
    """Return the model with or without its adapter, its tokenizer, and the name of the base."""
    import torch

    from loraplex.models.adapted import base_name, load_adapted, refuse_classifier
    from loraplex.models.loading import EMBEDDED, load_model, load_tokenizer

    adapter, dtype = arguments["adapter"], arguments["dtype"]
    name = arguments["model"] or (EMBEDDED if adapter == BARE else base_name(adapter))
    tokenizer = load_tokenizer(name)
    if adapter != BARE and not arguments["base"]:
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


def _adapter_in_words(arguments: Mapping[str, Any]) -> str | None:
    return None if arguments["base"] or arguments["adapter"] == BARE else arguments["adapter"]


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"output '{output}' is a file: give a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"output '{output}' is not empty: --overwrite replaces an earlier evaluation in it")


def _write(output: Path, result: Mapping[str, Any], records: list[dict[str, Any]]) -> None:
    from loraplex.evaluation import write_records
    from loraplex.files import remove, write_json

    write_json(output / "metrics.json", result)
    if records:
        write_records(output / "items.jsonl", records)
    else:
        # of an earlier evaluation
        remove(output / "items.jsonl")
