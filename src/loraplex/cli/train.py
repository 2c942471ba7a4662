"""`loraplex train`: a recipe in, a run folder out."""

from __future__ import annotations

import click

from loraplex.cli.recipe_arguments import RecipeCommand, split_arguments


@click.command(cls=RecipeCommand)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint, to the result of an uninterrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in the output folder.")
@click.option("--quiet", is_flag=True, help="Print the result only.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="RECIPE [--KEY VALUE]...")
def train(arguments: tuple[str, ...], resume: bool, overwrite: bool, quiet: bool) -> None:
    """Train an adapter as the file RECIPE says.

    Every key of the recipe can be overridden: --training.learning_rate 1e-3, or --learning_rate 1e-3 where no other
    section has that key. The run folder gets the adapter (saved, reloaded and compared), metrics, every evaluated
    item, the loss curve and the recipe with every default spelled out.
    """
    from loraplex.training.reading import read_recipe
    from loraplex.training.run import train as run

    path, overrides = split_arguments(arguments)
    recipe = read_recipe(path, overrides)

    def say(topic: str, text: str) -> None:
        if not quiet:
            click.echo(f"{topic + ':':9} {text}")

    result = run(recipe, resume=resume, overwrite=overwrite, say=say, progress=not quiet)
    speed, seconds = result.metrics["speed"], result.metrics["seconds"]
    say("speed", f"{speed['tokens_per_second']:.0f} tokens/s, {seconds['training']:.0f} s of training")
    click.echo(f"{'done:':9} {result.folder}")
