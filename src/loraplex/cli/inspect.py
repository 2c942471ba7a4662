"""`loraplex inspect`: what is in an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.cli.arguments import Parser, WrongUsageError, add_keys, in_words_of, section
from loraplex.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from loraplex.analysis.factor_map import Separation
    from loraplex.analysis.inspection import Inspection, SiteReport

DESCRIPTION = """Show sites, ranks, spectra and parameters of ADAPTER, and what it can be exported to.

Of a routed adapter also how its heads are used, on the rows of its run or on those given. ADAPTER is an adapter
folder, a run folder or a hub id, of loraplex or of stock PEFT (LoRA, DoRA). With --tsne, several can be compared:
do their A coincide, and their B part, as HydraLoRA's paper finds?"""

KEYS = {"--data": "data.test", "--limit": "data.max_test"}
CHANGED: dict[str, dict[str, Any]] = {
    "--data": {
        "help": "Routed adapters: measure their gates on these rows, task by task; may be given several times.",
    },
    "--limit": {"default": 256},
}


def parser(prog: str) -> Parser:
    """Return the parser of the command line."""
    made = Parser(prog, DESCRIPTION)
    made.add_argument("adapters", metavar="ADAPTER", nargs="+")
    made.add_argument("--model", help="Base model instead of the one named in the adapter folder.")
    made.add_argument("--sites", action="store_true", help="A line for every site instead of every kind of module.")
    made.add_argument("--tsne", type=Path, metavar="FILE", help="Draw a map of A and B of all ADAPTERs.")
    made.add_argument(
        "--module",
        dest="kinds",
        action="append",
        default=[],
        metavar="NAME",
        help="With --tsne: sites of this kind only (q_proj).",
    )
    add_keys(made, KEYS, CHANGED)
    made.add_argument("--json", action="store_true", help="Print everything as JSON, with the spectrum of every site.")
    return made


def run(arguments: Namespace) -> None:
    """Print what is in one adapter, or draw a map of several."""
    adapters: list[str] = arguments.adapters
    if arguments.tsne is not None:
        if arguments.sites:
            raise WrongUsageError("--tsne compares adapters, --sites shows one: give one of them")
        _compare(adapters, arguments.model, arguments.tsne, arguments.kinds, arguments.json)
        return
    if len(adapters) > 1 or arguments.kinds:
        what = f"{len(adapters)} adapters are" if len(adapters) > 1 else "--module is"
        raise WrongUsageError(f"{what} for a map: add --tsne FILE, or give one adapter alone")
    from loraplex.analysis.inspection import inspect
    from loraplex.data import DataOptions

    rows = section(arguments, "data")
    with in_words_of(KEYS):
        found = inspect(adapters[0], arguments.model, DataOptions(**rows) if rows["test"] else None)
    if arguments.json:
        print(json.dumps(as_plain(found), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for part in render(found, arguments.sites):
        console.print(part)


def _compare(adapters: Sequence[str], model: str | None, file: Path, kinds: Sequence[str], as_json: bool) -> None:
    """Draw the map of A and B, and print how far they lie apart."""
    from loraplex.analysis.factor_map import check_lengths, draw_vectors, read_vectors, separations
    from loraplex.plots import FORMS

    if file.suffix not in FORMS:
        raise UserError(f"--tsne '{file}': the picture is a file that ends in {', '.join(FORMS)}")
    if not file.parent.is_dir():
        raise UserError(f"--tsne '{file}': there is no folder '{file.parent}'; make it first")
    vectors = read_vectors(adapters, model, kinds)
    check_lengths(vectors)
    found = separations(vectors)
    where = f"A and B at {', '.join(dict.fromkeys(vector.kind for vector in vectors))}"
    draw_vectors(file, vectors, where)
    if as_json:
        print(json.dumps([vars(separation) for separation in found], indent=2))
        return
    from rich.console import Console

    Console(highlight=False).print(_separations(found))
    print(f"drawn: {file}")


def _separations(found: Sequence[Separation]) -> RenderableType:
    from rich.table import Table

    table = Table(title="How far apart", title_justify="left")
    table.add_column("")
    for heading in ("tensors", "length", "cosine at the same site", "silhouette"):
        table.add_column(heading, justify="right")
    for part in found:
        values = ("–" if value is None else f"{value:.3f}" for value in (part.similarity, part.silhouette))
        table.add_row(part.part, str(part.vectors), f"{part.length:,}", *values)
    table.caption_justify = "left"
    table.caption = (
        "cosine: 1 where adapters (or heads) have the same tensor, 0 where unrelated; silhouette: of the adapter, "
        "above 0 where its tensors lie together"
    )
    return table


def as_plain(found: Inspection) -> dict[str, Any]:
    """Return the inspection as plain values."""
    from dataclasses import asdict

    return {**asdict(found), "folder": str(found.folder)}


def render(found: Inspection, all_sites: bool) -> list[RenderableType]:
    """Return what to print."""
    from rich.markup import escape

    lines = [
        f"method      {found.method}, saved as {found.saved_as}",
        f"base model  {found.base or 'not named'}",
        f"parameters  {found.parameters:,} ({found.bytes:,} bytes in the file)",
        *(f"and         {what}" for what in found.beside),
    ]
    parts: list[RenderableType] = [escape(line) for line in lines]
    if found.sites:
        parts += ["", _table(found.sites, all_sites)]
    if found.routing is not None:
        parts += ["", _routing(found.routing, all_sites)]
    return [*parts, "", "Can be exported to", _exports(found)]


def _table(sites: Sequence[SiteReport], all_sites: bool) -> RenderableType:
    """Return norms and spectra of the sites, one line each or one for all of a kind."""
    from rich.table import Table

    groups: dict[str, list[SiteReport]] = {}
    for site in sites:
        groups.setdefault(site.name if all_sites else site.kind, []).append(site)
    table = Table(title="BA, all scaling included", title_justify="left")
    table.add_column("site" if all_sites else "module", overflow="fold")
    for heading in ("sites", "rank", "‖BA‖ mean", "largest σ", "stable rank", "parameters"):
        table.add_column(heading, justify="right")
    for name, group in groups.items():
        largest = max((site.spectrum[0] for site in group if site.spectrum), default=0.0)
        table.add_row(
            name,
            str(len(group)),
            _span([site.rank for site in group]),
            f"{sum(site.norm for site in group) / len(group):.3g}",
            f"{largest:.3g}",
            f"{sum(site.stable_rank for site in group) / len(group):.1f}",
            f"{sum(site.rank * (site.in_features + site.out_features) for site in group):,}",
        )
    if not all_sites:
        table.caption, table.caption_justify = "parameters: of the pairs as plain LoRA", "left"
    return table


def _routing(routing: Mapping[str, Any], all_sites: bool) -> RenderableType:
    """Return the gates task by task: of every site, or their means over all of a kind.

    Heads of different sites have nothing to do with each other, so those of a kind are sorted by their load before
    they are averaged.
    """
    from rich.table import Table

    from loraplex.allocation.sites import kind_of

    table = Table(title=f"mean gates on the {routing['rows']} rows", title_justify="left")
    for heading in ("task", "site" if all_sites else "module"):
        table.add_column(heading, overflow="fold")
    heading = "heads" if all_sites else "heads, the most used first"
    for name in (heading, "entropy", "dead heads"):
        table.add_column(name, justify="right")
    for task, sites in routing["tasks"].items():
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for site, summary in sites.items():
            groups.setdefault(site if all_sites else kind_of(site), []).append(summary)
        for name, group in groups.items():
            loads = [s["load"] if all_sites else sorted(s["load"], reverse=True) for s in group]
            means = [sum(column) / len(group) for column in zip(*loads, strict=True)]
            entropy, dead = (sum(s[key] for s in group) / len(group) for key in ("entropy", "dead"))
            table.add_row(task or "-", name, " ".join(f"{gate:.2f}" for gate in means), f"{entropy:.0%}", f"{dead:.0%}")
    table.caption, table.caption_justify = "entropy: 100 % where every token weighs all heads alike", "left"
    return table


def _span(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}–{high}"


def _exports(found: Inspection) -> RenderableType:
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for target, reason in found.exports.items():
        table.add_row(target, "yes" if reason is None else f"no: {reason}")
    return table
