"""One method by name, for `loraplex methods NAME`: what it is, what it needs, its options, how a recipe writes it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from loraplex.errors import UserError, nearest

if TYPE_CHECKING:
    from rich.console import RenderableType

    from loraplex.adapters.registry import Method, Preset


def describe(name: str) -> dict[str, Any]:
    """Return a method, or the factors and combine of an adapter, as plain data.

    Raises:
        UserError: when there is no such name; the message has the nearest.
    """
    from loraplex.adapters.registry import Axis
    from loraplex.methods import REGISTRY

    if (preset := REGISTRY.presets.get(name)) is not None:
        parts = [REGISTRY.get(Axis.FACTORS, preset.factors), REGISTRY.get(Axis.COMBINE, preset.combine)]
        return _described(preset, parts, "adapter", preset.options)
    if found := [method for method in REGISTRY.methods.values() if method.name == name]:
        return _described(found[0], found[:1], found[0].axis.value, {})
    known = list(dict.fromkeys([*REGISTRY.presets, *(method.name for method in REGISTRY.methods.values())]))
    raise UserError(f"there is no method '{name}': known are {', '.join(known)}.{nearest(name, known)}")


def _described(entry: Preset | Method, parts: list[Method], axis: str, changed: Any) -> dict[str, Any]:
    from loraplex.documentation import documented

    options: list[dict[str, Any]] = [
        {
            "name": key.path,
            "type": key.type,
            "choices": list(key.choices),
            "default": changed.get(key.path, key.default),
            "what": key.doc,
        }
        for part in parts
        for key in documented(part.options)
    ]
    provided = {capability for part in parts for capability in part.provides}
    needs = {capability for part in parts for capability in part.needs} - provided
    return {
        "name": entry.name,
        "axis": axis,
        "summary": entry.summary,
        "parameters": entry.parameters,
        "paper": entry.paper,
        "parts": [f"{part.axis.value} {part.name}" for part in parts],
        "needs": sorted(capability.value for capability in needs),
        "recipe": _recipe(entry.name, parts, axis, options),
        "options": options,
    }


def _recipe(name: str, parts: list[Method], axis: str, options: list[dict[str, Any]]) -> str:
    """Return how a recipe asks for it, with its first option at its default."""
    from loraplex.adapters.registry import Axis, incompatibility
    from loraplex.methods import REGISTRY

    asked, others = f"name: {name}", {Axis.FACTORS: Axis.COMBINE, Axis.COMBINE: Axis.FACTORS}
    if len(parts) == 1 and (other := others.get(parts[0].axis)):
        partner = next(method for method in REGISTRY.members(other) if incompatibility(parts[0], method) is None)
        asked, axis = f"{axis}: {name}, {other.value}: {partner.name}", "adapter"
    elif not options:
        return f"adapter: {{{axis}: {name}}}"
    first = f", {options[0]['name']}: {_as_yaml(options[0]['default'])}" if options else ""
    return f"adapter: {{{axis}: {{{asked}{first}}}}}"


def render(description: dict[str, Any]) -> list[RenderableType]:
    """Return what to print of a description: a heading, a line for a recipe, and the table of options."""
    from rich.markup import escape
    from rich.table import Table

    options = description["options"]
    lines = [f"[bold]{escape(description['name'])}[/bold] ({description['axis']}): {escape(description['summary'])}"]
    lines.append(f"Source: {description['paper']}. Trainable parameters: {escape(description['parameters'])}.")
    if description["needs"]:
        lines.append(f"Needs of the others: {escape('; '.join(description['needs']))}.")
    lines.append(f"In a recipe: {escape(description['recipe'])}")
    if not options:
        return ["\n".join(lines), "It has no options."]
    table = Table("option", "default", "what it does", title="Options", title_justify="left")
    table.columns[0].no_wrap = True
    for option in options:
        choices = f" One of {', '.join(option['choices'])}." if option["choices"] else ""
        table.add_row(option["name"], _as_yaml(option["default"]), escape(option["what"] + choices))
    return ["\n".join(lines), table]


def _as_yaml(value: Any) -> str:
    """Return a default as a recipe would have it."""
    return value if isinstance(value, str) else json.dumps(value)
