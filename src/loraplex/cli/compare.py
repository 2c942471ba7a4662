"""`loraplex compare`: arms × seeds under one budget in, evidence out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex.cli.recipe_arguments import RecipeParser
from loraplex.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace

    from rich.console import RenderableType

    from loraplex.comparison.results import Comparison
    from loraplex.comparison.summary import Summary


DESCRIPTION = """Compare ways of adapting one model on one task, as the file RECIPE says.

Every arm gets the same rows in the same order and the same budget of trainable parameters; the differences come
with intervals that allow for seeds and items. Called again, it goes on where it stopped; arms and seeds that are
added later reuse what is there, as long as data, base model, packages and loraplex's code are the same. The output
folder gets report.html, results.json and CSV files."""


def parser(prog: str) -> RecipeParser:
    """Return the parser of the command line."""
    made = RecipeParser(prog, DESCRIPTION, compares=True)
    made.add_argument("--quiet", action="store_true", help="Print the result only.")
    return made


def run(arguments: Namespace) -> None:
    """Run what is missing of the comparison, and print what came out."""
    from loraplex.comparison.comparison_recipe import read_comparison

    recipe = read_comparison(arguments.recipe, arguments.overrides)
    quiet: bool = arguments.quiet

    from loraplex.comparison.compare import compare
    from loraplex.comparison.statistics import summarize

    def say(topic: str, text: str) -> None:
        if not quiet:
            print(f"{topic + ':':11} {text}")

    comparison = compare(recipe, say=say, progress=not quiet)
    _print(comparison, summarize(comparison))
    print(f"report:     {recipe.output / 'report.html'}")
    failed = [f"{arm.name} seed {run.seed} ({run.error})" for arm in comparison.arms for run in arm.runs if run.error]
    if failed:
        raise UserError(f"{len(failed)} runs failed: {'; '.join(failed)}; the same command tries them again")


def _print(comparison: Comparison, summary: Summary) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print()
    console.print(_table(comparison, summary))
    for text in (summary.beforehand, *(contrast.sentence for contrast in summary.contrasts)):
        console.print(text, markup=False)


def _table(comparison: Comparison, summary: Summary) -> RenderableType:
    from rich.table import Table

    table = Table(title=comparison.name, title_justify="left", pad_edge=False)
    table.add_column("arm", overflow="fold")
    for heading in ("accuracy", "95 % interval", "between\nseeds", "parameters", "s/step"):
        table.add_column(heading, justify="right")
    if comparison.base is not None and comparison.base.accuracy is not None:
        table.add_row("base model", f"{comparison.base.accuracy:.3f}", "", "", "0", "", style="dim")
    found = {statistics.arm: statistics for statistics in summary.arms}
    for arm in comparison.arms:
        steps = [run.seconds_per_step for run in arm.runs if run.seconds_per_step is not None]
        speed = f"{sum(steps) / len(steps):.2f}" if steps else ""
        parameters = f"{arm.trainable:,}{'' if arm.within_budget else ' *'}"
        statistics = found.get(arm.name)
        if statistics is None:
            table.add_row(arm.name, "–", "", "", parameters, speed)
            continue
        interval = "{:.3f} – {:.3f}".format(*statistics.interval) if statistics.interval else "one seed"
        spread = "" if statistics.between_seeds is None else f"{statistics.between_seeds:.3f}"
        table.add_row(arm.name, f"{statistics.mean:.3f}", interval, spread, parameters, speed)
    if not all(arm.within_budget for arm in comparison.arms):
        table.caption, table.caption_justify = "* more than 2 % off the budget", "left"
    return table
