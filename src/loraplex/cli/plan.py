"""`loraplex plan`: what a recipe would train and need, before it does."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from loraplex.cli.recipe_arguments import RecipeParser

if TYPE_CHECKING:
    from argparse import Namespace

    from rich.console import RenderableType

    from loraplex.training.estimate import Estimate


DESCRIPTION = """Show sites, ranks, trainable parameters, memory and time of RECIPE without training.

Data and model configuration are read, the weights are not. Sites and parameters are exact, memory and time are
estimates."""


def parser(prog: str) -> RecipeParser:
    """Return the parser of the command line."""
    made = RecipeParser(prog, DESCRIPTION)
    made.add_argument("--json", action="store_true", help="Print the same as JSON, with the rank of every site.")
    return made


def run(arguments: Namespace) -> None:
    """Print the plan."""
    from loraplex.training.reading import read_recipe

    recipe = read_recipe(arguments.recipe, arguments.overrides)

    from loraplex.models.loading import load_tokenizer
    from loraplex.training.estimate import estimate
    from loraplex.training.preparation import read_rows, resolve_from_data

    recipe, decided = resolve_from_data(recipe)
    for choice in decided:
        print(f"decided: {choice.summary}", file=sys.stderr if arguments.json else sys.stdout)
    rows = read_rows(recipe, load_tokenizer(recipe.model.name))
    found = estimate(recipe, rows)
    if arguments.json:
        print(json.dumps(as_plain(found), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for part in render(found):
        console.print(part)


def as_plain(found: Estimate) -> dict[str, Any]:
    """Return the estimate as plain values."""
    from dataclasses import asdict

    memory = {**asdict(found.memory), "above_weights": found.memory.above_weights, "total": found.memory.total}
    batches = {**asdict(found.batches), "most_tokens": found.batches.most_tokens}
    return {**asdict(found), "memory": memory, "batches": batches}


def render(found: Estimate) -> list[RenderableType]:
    """Return the tables to print."""
    return [_sites(found), "", _needs(found)]


def _sites(found: Estimate) -> RenderableType:
    from rich.table import Table

    table = Table(title="Trained (exact)", title_justify="left")
    table.add_column("module")
    for heading in ("sites", "rank", "parameters", "share of the model"):
        table.add_column(heading, justify="right")
    for kind in found.kinds:
        low, high = kind.ranks
        rank = "–" if not kind.sites else str(low) if low == high else f"{low}–{high}"
        sites = f"{kind.sites:,}" if kind.sites else "–"
        table.add_row(kind.name, sites, rank, f"{kind.parameters:,}", f"{kind.parameters / found.total:.3%}")
    table.add_section()
    share = f"{found.trainable / found.total:.3%}"
    name = "all" if found.kept is None else "all candidates"
    table.add_row(name, f"{len(found.ranks):,}", "", f"{found.trainable:,}", share, style="bold")
    for word, kept in _kept(found):
        table.add_row(f"kept, {word} ({found.budget})", "", "", f"{kept:,}", f"{kept / found.total:.3%}", style="bold")
    return table


def _kept(found: Estimate) -> list[tuple[str, int]]:
    """Return what an allocation's budget leaves of the candidates; nothing where no rank moves."""
    if found.kept is None or found.kept_at_most is None:
        return []
    about = [("about", found.kept)] if found.kept != found.kept_at_most else []
    return [*about, ("at most", found.kept_at_most)]


def _needs(found: Estimate) -> RenderableType:
    from rich.table import Table

    batches, memory = found.batches, found.memory
    table = Table(title="Needed (estimates)", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    padding = "padding included" if batches.padded else "without padding"
    tokens = f"{batches.mean_tokens:,.0f} tokens a pass on average, {batches.most_tokens:,} at most, {padding}"
    table.add_row("optimizer steps", f"{batches.steps:,}", f"{batches.per_step} × {batches.rows} rows; {tokens}")
    table.add_section()
    explained = {
        "weights": "frozen",
        "adapter": "trained, in float32",
        "gradients": "of the adapter",
        "optimizer": "state of the adapter",
        "activations": "kept for the backward pass of the largest batch",
        "head": "logits, a slice of the positions at a time",
        "passing": "comes and goes in the backward pass, library scratch",
    }
    for name, note in explained.items():
        table.add_row(name, _bytes(getattr(memory, name)), note)
    table.add_row("memory", _bytes(memory.total), "besides the Python process itself", style="bold")
    table.add_section()
    table.add_row("training time", _duration(found.seconds), "from a probe of two blocks on this machine", style="bold")
    return table


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
