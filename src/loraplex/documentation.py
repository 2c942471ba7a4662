"""The fields of a dataclass of options, with the doc lines that stand under them, their defaults and their choices."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Key:
    """One option: a key of a recipe, or an option of a method."""

    path: str
    """Dotted: section.key; at the top level the name alone."""
    doc: str
    """What it does, on one line."""
    type: str = ""
    """Types of JSON joined by " or ": integer, number, string, boolean, array, object; empty for any value."""
    required: bool = False
    """Whether it has no default."""
    default: Any = None
    """As JSON would have it; None where it is required."""
    choices: tuple[str, ...] = ()
    """The words that are allowed; empty where the type says all."""
    least: int | None = None
    """The smallest whole number that is allowed; None where the type does not say."""


def documented(options: type[Any], section: str = "") -> list[Key]:
    """Return the fields that `options` and its bases in loraplex declare, in the order of the dataclass.

    Needs pydantic, which reads the doc lines, and the source files, in which they stand.
    """
    schemas: dict[str, Mapping[str, Any]] = {}
    for cls in reversed(options.__mro__):
        if "__dataclass_fields__" in vars(cls) and cls.__module__.startswith("loraplex."):
            properties = _properties(cls)
            schemas |= {name: properties[name] for name in inspect.get_annotations(cls) if name in properties}
    prefix = f"{section}." if section else ""
    return [_key(entry, prefix, schemas[entry.name]) for entry in dataclasses.fields(options) if entry.name in schemas]


def _properties(cls: type[Any]) -> Mapping[str, Mapping[str, Any]]:
    """Return the JSON schemas of the fields of a dataclass; pydantic finds the doc lines of `cls`, not of its bases."""
    from pydantic import ConfigDict, TypeAdapter, with_config

    found = with_config(ConfigDict(use_attribute_docstrings=True))(cls)
    schema = TypeAdapter(found).json_schema()
    properties: Mapping[str, Mapping[str, Any]] = schema["properties"]
    return properties


def _key(entry: dataclasses.Field[Any], prefix: str, schema: Mapping[str, Any]) -> Key:
    default, required = entry.default, False
    if entry.default_factory is not dataclasses.MISSING:
        default = entry.default_factory()
    elif default is dataclasses.MISSING:
        default, required = None, True
    branches = [branch for branch in schema.get("anyOf", [schema]) if branch.get("type") != "null"]
    return Key(
        path=prefix + entry.name,
        doc=" ".join(schema.get("description", "").split()),
        type=" or ".join(dict.fromkeys(branch["type"] for branch in branches if "type" in branch)),
        required=required,
        default=list(default) if isinstance(default, tuple) else default,
        choices=tuple(word for branch in branches for word in branch.get("enum", [branch.get("const")]) if word),
        least=next((least for least in map(_least, branches) if least is not None), None),
    )


def _least(branch: Mapping[str, Any]) -> int | None:
    """Return the smallest whole number that a JSON schema allows, None where it says nothing of that."""
    if branch.get("type") != "integer":
        return None
    return branch["exclusiveMinimum"] + 1 if "exclusiveMinimum" in branch else branch.get("minimum")
