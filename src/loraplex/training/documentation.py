"""The keys of a recipe with their doc lines, read from the source of the dataclasses: nothing heavy is imported."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path

import loraplex
from loraplex.training.recipe import Recipe

# Read as text: importing it costs seconds of peft and torch, too much for a help page.
ADAPTER_SOURCE = Path(loraplex.__file__).parent / "tuner" / "options.py"
# Set by a training run itself.
NOT_IN_RECIPES = {"task_type", "inference_mode"}


@dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    path: str
    """Dotted: section.key."""
    type: str
    """As annotated in the source."""
    default: str
    """As written in the source; empty when the key is required."""
    doc: str

    @property
    def section(self) -> str:
        """The part before the dot, or "" at the top level."""
        return self.path.rpartition(".")[0]


def recipe_keys() -> list[Key]:
    """Return every key of a recipe, section by section."""
    sections = {entry.name: entry.default_factory for entry in dataclasses.fields(Recipe)}
    keys = []
    for key in documented_fields(inspect.getsource(Recipe), "Recipe"):
        if key.path == "adapter":
            keys += adapter_keys()
        elif key.type in (options := _options_classes()):
            cls = options[key.type]
            keys += documented_fields(_source_of(cls), cls.__name__, key.path)
        else:
            assert key.path in sections, key.path
            keys.append(key)
    return keys


def adapter_keys() -> list[Key]:
    """Return the keys of the adapter section: the fields that AdapterConfig itself declares."""
    keys = documented_fields(ADAPTER_SOURCE.read_text(encoding="utf-8"), "AdapterOptions", "adapter")
    return [key for key in keys if key.path.removeprefix("adapter.") not in NOT_IN_RECIPES]


def option_keys(options: type) -> list[Key]:
    """Return the fields of a dataclass of options, its own and inherited ones, with their doc lines."""
    found: dict[str, Key] = {}
    for cls in options.__mro__:
        if dataclasses.is_dataclass(cls) and inspect.get_annotations(cls):
            for key in documented_fields(_source_of(cls), cls.__name__):
                found.setdefault(key.path, key)
    return [found[entry.name] for entry in dataclasses.fields(options)]


def documented_fields(source: str, class_name: str, section: str = "") -> list[Key]:
    """Return the annotated fields of a class in `source`, each with the docstring below or the comment above it."""
    lines = source.splitlines()
    classes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef))
    body = next(node for node in classes if node.name == class_name).body
    keys = []
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            doc = str(following.value.value)
        else:
            doc = _comment_above(lines, statement.lineno)
        path = f"{section}.{statement.target.id}" if section else statement.target.id
        keys.append(Key(path, ast.unparse(statement.annotation), _default(statement.value), " ".join(doc.split())))
    return keys


def _comment_above(lines: list[str], number: int) -> str:
    """Return the text of the comment lines that end just above line `number` (counted from 1)."""
    comment: list[str] = []
    for line in reversed(lines[: number - 1]):
        if not line.strip().startswith("#"):
            break
        comment.insert(0, line.strip().lstrip("# "))
    return " ".join(comment)


def _default(value: ast.expr | None) -> str:
    """Return the source of a field's default; `field(default=8)` is "8", a factory is the empty value it makes."""
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Typed":
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default" in given:
            return ast.unparse(given["default"])
        factory = given.get("default_factory")
        if isinstance(factory, ast.Lambda):
            return ast.unparse(factory.body)
        return {"dict": "{}", "list": "[]"}.get(ast.unparse(factory), "") if factory else ""
    return ast.unparse(value)


def _options_classes() -> dict[str, type]:
    """Return the dataclass of each section by its name."""
    types = inspect.get_annotations(Recipe, eval_str=True).values()
    return {cls.__name__: cls for cls in types if dataclasses.is_dataclass(cls) and isinstance(cls, type)}


def _source_of(cls: type) -> str:
    """Return the source of the module that defines `cls`."""
    return Path(inspect.getfile(cls)).read_text(encoding="utf-8")
