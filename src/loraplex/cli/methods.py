"""`loraplex methods [NAME]`: the registry and its capability matrix, read off the records. No method is named here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from loraplex.cli.arguments import Parser

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable

    from rich.console import RenderableType

    from loraplex.adapters.registry import Adapter, Method


DESCRIPTION = """List the methods and what each of them can do; with NAME, explain the options of one.

An adapter is a pair of factors and combine; an allocation and an objective go with it. The matrix shows which of
them go together and, below it, why the others do not."""


def parser(prog: str) -> Parser:
    """Return the parser of the command line."""
    made = Parser(prog, DESCRIPTION)
    made.add_argument("name", metavar="NAME", nargs="?")
    made.add_argument("--json", action="store_true", help="Print the same as JSON.")
    return made


def run(arguments: Namespace) -> None:
    """Print the tables, or the page of one method."""
    from loraplex.cli import method_page

    name: str | None = arguments.name
    description = describe() if name is None else method_page.describe(name)
    if arguments.json:
        print(json.dumps(description, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    # Off a terminal the tables are as wide as they need to be, so that nothing is cut in a file.
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    for part in _render(description) if name is None else method_page.render(description):
        console.print(part)


def describe() -> dict[str, Any]:
    """Return presets, methods by axis and the matrix as plain data."""
    from loraplex.adapters.registry import Axis
    from loraplex.methods import REGISTRY

    presets = [
        {
            "name": preset.name,
            "factors": preset.factors,
            "combine": preset.combine,
            "summary": preset.summary,
            "parameters": preset.parameters,
            "paper": preset.paper,
        }
        for preset in REGISTRY.presets.values()
    ]
    axes = {axis.value: [_describe_method(method) for method in REGISTRY.members(axis)] for axis in Axis}
    return {"adapters": presets, "axes": axes, "matrix": _matrix()}


def _describe_method(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "parameters": method.parameters,
        "paper": method.paper,
        "provides": sorted(capability.value for capability in method.provides),
        "needs": sorted(capability.value for capability in method.needs),
    }


def _matrix() -> list[dict[str, Any]]:
    """Return one row per pair of factors and combine: legal or why not, and what goes with it."""
    from loraplex.adapters.registry import Adapter, Axis, incompatibility
    from loraplex.methods import REGISTRY

    rows = []
    for factors in REGISTRY.members(Axis.FACTORS):
        for combine in REGISTRY.members(Axis.COMBINE):
            refused = incompatibility(factors, combine)
            row: dict[str, Any] = {"factors": factors.name, "combine": combine.name, "refused": refused}
            if refused is None:
                row |= _describe_pair(Adapter(factors.options(), combine.options()))
            rows.append(row)
    return rows


def _describe_pair(adapter: Adapter) -> dict[str, Any]:
    """Return what a legal pair can do; for each other method None, or the sentence that refuses it."""
    from loraplex.adapters.registry import Axis, incompatibility
    from loraplex.methods import REGISTRY

    row: dict[str, Any] = {
        "adapter": adapter.describe(),
        "saved_as": adapter.save_format.value,
        "mergeable": adapter.mergeable,
    }
    for axis in (Axis.ALLOCATION, Axis.OBJECTIVE):
        row[axis.value] = {other.name: incompatibility(*adapter.methods, other) for other in REGISTRY.members(axis)}
    return row


def _render(description: dict[str, Any]) -> list[RenderableType]:
    """Return the tables and footnotes to print."""
    axes = description["axes"]
    return [
        _table(
            "Adapters by name",
            ("adapter", "factors", "combine", "summary", "parameters", "paper"),
            _presets(description),
        ),
        _table("Methods by axis", ("axis", "method", "summary", "parameters", "paper"), _members(axes)),
        *_capability_table(axes),
        *_pairs_table(description),
    ]


def _table(title: str, headings: Iterable[str], rows: Iterable[Iterable[str]]) -> RenderableType:
    from rich.table import Table

    filled = [list(row) for row in rows]
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        cells = [heading, *(row[index] for row in filled if index < len(row))]
        # A short word is not broken to make room for a long sentence.
        is_short = all(len(line) <= 10 for cell in cells for line in cell.splitlines())
        table.add_column(heading, overflow="fold", no_wrap=is_short)
    for row in filled:
        table.add_row(*row)
    return table


def _presets(description: dict[str, Any]) -> list[list[str]]:
    keys = ("name", "factors", "combine", "summary", "parameters", "paper")
    return [[preset[key] for key in keys] for preset in description["adapters"]]


def _members(axes: dict[str, Any]) -> list[list[str]]:
    keys = ("name", "summary", "parameters", "paper")
    return [[axis, *(entry[key] for key in keys)] for axis, entries in axes.items() for entry in entries]


def _capability_table(axes: dict[str, Any]) -> list[RenderableType]:
    """Return the table of what every method offers and needs, and under it what the headings mean."""
    from loraplex.adapters.registry import Capability

    words = {capability.value: capability.name.lower().replace("_", " ") for capability in Capability}
    verbs = {"provides": "offers", "needs": "needs"}
    rows = []
    for entry in (entry for entries in axes.values() for entry in entries):
        cells = (" ".join(verb for key, verb in verbs.items() if meaning in entry[key]) for meaning in words)
        rows.append([entry["name"], *cells])
    table = _table("What a method offers to the others and needs from them", ("method", *words.values()), rows)
    return [table, *(f"{word}: {meaning}" for meaning, word in words.items())]


def _pairs_table(description: dict[str, Any]) -> list[RenderableType]:
    """Return the table of all pairs of factors and combine, and under it the reasons that its numbers point to."""
    reasons: list[str] = []

    def mark(reason: str | None) -> str:
        if reason is None:
            return "yes"
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})"

    others = [(axis, entry["name"]) for axis in ("allocation", "objective") for entry in description["axes"][axis]]
    rows = []
    for pair in description["matrix"]:
        cells = [pair["factors"], pair["combine"], mark(pair["refused"])]
        if pair["refused"] is None:
            cells += ["yes" if pair["mergeable"] else "no", pair["saved_as"]]
            cells += [mark(pair[axis][name]) for axis, name in others]
        rows.append(cells)
    headings = ("factors", "combine", "possible", "merges", "saved as", *(f"{axis}\n{name}" for axis, name in others))
    table = _table("What goes together", headings, rows)
    return [table, *(f"({number}) {reason}" for number, reason in enumerate(reasons, 1))]
