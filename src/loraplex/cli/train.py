"""`loraplex train`: a recipe in, a run folder out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex.cli.recipe_arguments import RecipeParser

if TYPE_CHECKING:
    from argparse import Namespace

DESCRIPTION = """Train an adapter as the file RECIPE says.

Every key of the recipe can be overridden: --training.learning_rate 1e-3, or --learning_rate 1e-3 where no other
section has that key. The run folder gets the adapter (saved, reloaded and compared), metrics, every evaluated
item, the loss curve and the recipe with every default spelled out."""


def parser(prog: str) -> RecipeParser:
    """Return the parser of the command line."""
    made = RecipeParser(prog, DESCRIPTION)
    made.add_argument(
        "--resume", action="store_true", help="Go on from the last checkpoint, to the result of an uninterrupted run."
    )
    made.add_argument("--overwrite", action="store_true", help="Replace an earlier run in the output folder.")
    made.add_argument("--quiet", action="store_true", help="Print the result only.")
    return made


def run(arguments: Namespace) -> None:
    """Train, and say where the run is."""
    from loraplex.training.reading import read_recipe
    from loraplex.training.run import train

    recipe = read_recipe(arguments.recipe, arguments.overrides)
    quiet: bool = arguments.quiet

    def say(topic: str, text: str) -> None:
        if not quiet:
            print(f"{topic + ':':9} {text}")

    result = train(recipe, resume=arguments.resume, overwrite=arguments.overwrite, say=say, progress=not quiet)
    speed, seconds = result.metrics["speed"], result.metrics["seconds"]
    say("speed", f"{speed['tokens_per_second']:.0f} tokens/s, {seconds['training']:.0f} s of training")
    print(f"{'done:':9} {result.folder}")
