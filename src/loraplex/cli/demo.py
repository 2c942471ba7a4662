"""`loraplex demo`: the first five minutes. The same functions as `train`, then stock PEFT on what was saved."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.cli.arguments import Parser
from loraplex.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from loraplex.data import Example
    from loraplex.training.recipe import Recipe

RECIPE = Path(__file__).with_name("demo.yaml")
OUTPUT = "runs/demo"
# Enough to pass through every stage, too little to learn from.
SHORT = [
    "--training.max_steps",
    "6",
    "--data.max_train",
    "48",
    "--data.max_test",
    "12",
    "--evaluation.batch_size",
    "12",
    # A processor without instructions for bfloat16 takes minutes for a step in it; nothing is measured here.
    "--model.dtype",
    "float32",
]
COMPARED_ROWS = 4
LARGEST_DIFFERENCE = 1e-5
SMALLEST_GAIN = 0.10


DESCRIPTION = """Train an adapter on the embedded model and watch it get better.

Needs no network and no data: the model comes with a package, the task is made up. The adapter that comes out is
loaded by stock PEFT in a process without loraplex and has to compute the same."""


def parser(prog: str) -> Parser:
    """Return the parser of the command line."""
    made = Parser(prog, DESCRIPTION)
    made.add_argument(
        "--short", action="store_true", help="A few steps and items: shows that everything works, not that it learns."
    )
    made.add_argument(
        "--output", default=OUTPUT, metavar="FOLDER", help=f"Run folder; the default one is replaced. [{OUTPUT}]"
    )
    made.add_argument("--overwrite", action="store_true", help="Replace an earlier run in another folder too.")
    return made


def run(arguments: Namespace) -> None:
    """Train, load the adapter in stock PEFT, and show what it has learned."""
    from loraplex.data import read_examples
    from loraplex.training.reading import read_recipe
    from loraplex.training.run import train

    start = time.perf_counter()
    short: bool = arguments.short
    output: str = arguments.output
    recipe = read_recipe(RECIPE, [*(SHORT if short else []), "--output", output])
    _say("task", "reverse a list of words; the model is SmolLM2-135M-Instruct, the adapter LoRA")
    result = train(recipe, overwrite=arguments.overwrite or output == OUTPUT, say=_say, progress=True)
    examples = read_examples(recipe.data, "test")
    difference = _difference_to_stock_peft(recipe, result.adapter, examples[:COMPARED_ROWS])
    _say("peft", f"without loraplex: largest difference of a logit {difference:.1g} in float32 ({COMPARED_ROWS} rows)")
    _show_example(result.folder / "evaluation", examples)
    accuracy = result.metrics["accuracy"]
    _show_accuracy(accuracy["before"], accuracy["after"])
    if short:
        print("\nThis was the short form: too few steps to learn anything. The full one: loraplex demo")
    else:
        check_gain(accuracy["before"], accuracy["after"])
    _show_next(result.folder)
    print(f"\n{time.perf_counter() - start:.0f} s in all")


def check_gain(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Hold the run to what the demo promises.

    Raises:
        UserError: unless accuracy rose 10 points and two standard errors above both the base model and a model that
            always gives the most frequent answer.
    """
    error = after["standard_error"]
    bars = {
        "the base model": (before["value"], math.hypot(error, before["standard_error"])),
        "the most frequent answer": (after["majority_share"], error),
    }
    for name, (value, standard_error) in bars.items():
        needed = value + max(SMALLEST_GAIN, 2 * standard_error)
        if after["value"] < needed:
            raise UserError(
                f"the adapter reaches {after['value']:.3f}, but {needed:.3f} is needed to be clearly above {name} "
                f"({value:.3f}): please report this with the folder of the run"
            )


def _difference_to_stock_peft(recipe: Recipe, adapter: Path, examples: Sequence[Example]) -> float:
    """Return the largest difference of a logit between loraplex and stock PEFT, both in float32 on the saved adapter.

    Raises:
        UserError: when it is not negligible.
    """
    from loraplex.data.tokenization import prompt_ids
    from loraplex.models.agreement import model_logits
    from loraplex.models.loading import load_tokenizer, resolve_model
    from loraplex.models.stock_peft import stock_logits
    from loraplex.tuner.adapted_model import load_adapted

    rows = prompt_ids(examples, load_tokenizer(recipe.model.name))
    theirs = stock_logits(resolve_model(recipe.model.name), str(adapter), rows)
    # On the CPU like the other side, whatever trained it.
    model = load_adapted(str(adapter), dtype="float32").cpu()
    ours = model_logits(model, rows)
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    if not difference <= LARGEST_DIFFERENCE:
        raise UserError(f"stock PEFT computes something else with '{adapter}': logits differ by {difference:.2g}")
    return difference


def _show_example(evaluation: Path, examples: Sequence[Example]) -> None:
    """Print what the model wrote before and after, for the first item that it has learned, or the first of all."""
    before, after = (
        [json.loads(line) for line in (evaluation / f"{when}.jsonl").read_text(encoding="utf-8").splitlines()]
        for when in ("before", "after")
    )
    learned = (i for i in range(len(after)) if after[i]["correct"] and not before[i]["correct"])
    index = next(learned, 0)
    prompt = examples[index].prompt
    question = prompt if isinstance(prompt, str) else prompt[-1].content
    print(f"\n  question      {_clipped(question.splitlines()[-1])}")
    print(f"  right answer  {_clipped(after[index]['expected'])}")
    print(f"  before        {_clipped(before[index]['text'])}")
    print(f"  after         {_clipped(after[index]['text'])}")


def _clipped(text: str, width: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _show_accuracy(before: dict[str, Any], after: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Share of {after['items']} unseen items answered exactly", title_justify="left")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_column("standard error", justify="right")
    table.add_row("base model", f"{before['value']:.3f}", f"{before['standard_error']:.3f}")
    table.add_row("most frequent answer", f"{after['majority_share']:.3f}", "")
    table.add_row("with the adapter", f"{after['value']:.3f}", f"{after['standard_error']:.3f}")
    print()
    Console().print(table)


def _show_next(folder: Path) -> None:
    print("\nWhat next:")
    for command, purpose in {
        f'loraplex generate {folder} --prompt "…"': "ask it yourself",
        f"loraplex train {folder}/recipe.yaml --adapter dora --output {folder}-dora": "the same with DoRA",
        "loraplex methods": "what else there is",
    }.items():
        print(f"  {command}\n      {purpose}")


def _say(topic: str, text: str) -> None:
    print(f"{topic + ':':9} {text}")
