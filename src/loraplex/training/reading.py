"""YAML and `--key value` overrides to a checked `Recipe`, and back. Every mistake is one line that names the key."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from loraplex.errors import UserError, nearest
from loraplex.training.recipe import SHORT_FORMS, Recipe

HINTS = typing.get_type_hints(Recipe, include_extras=True)
SECTIONS = {name: cls for name, cls in HINTS.items() if isinstance(cls, type) and dataclasses.is_dataclass(cls)}
# Its keys are the fields of `AdapterConfig`.
ADAPTER = "adapter"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 3e-4 is a number and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise yaml.MarkedYAMLError(problem=f"the key '{twice}' stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads 3e-4 (no point) as text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in the YAML file `path`, with overrides ["--section.key", "value", "--key=value", ...].

    Raises:
        UserError: one line that names the file or option, the key, the value and what is expected.
    """
    _, mapping = load_mapping(Path(path))
    if "arms" in mapping:
        raise UserError(f"{path} is the recipe of a comparison: loraplex compare {path}")
    given = parse_overrides(overrides)
    return recipe_from_mapping(mapping, given, source=str(path))


def load_mapping(path: Path) -> tuple[str, dict[str, Any]]:
    """Return a YAML file as text and as the mapping it has to be.

    Raises:
        UserError: when there is no such file, or it is not a mapping.
    """
    text = _read_text(path)
    mapping = _load_yaml(text, str(path))
    if not isinstance(mapping, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, this is a {type(mapping).__name__}")
    return text, mapping


def recipe_from_mapping(
    mapping: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, source: str = "recipe"
) -> Recipe:
    """Return the recipe of a nested mapping; `overrides` maps dotted or unambiguous short keys to values.

    Raises:
        UserError: for an unknown key, a wrong type or a value out of range.
    """
    known = known_paths()
    flat = {path: (value, f"{source}: {path}") for path, value in _flatten(mapping, known, source)}
    given = (entry for key, value in (overrides or {}).items() for entry in _spread(key, value, known))
    for path, value in given:
        flat = {kept: entry for kept, entry in flat.items() if not kept.startswith(path + ".")}
        flat[path] = (value, f"--{path}")
    return _typed(_validate(flat, source), flat)


def known_paths() -> list[str]:
    """Return every key that a recipe may have, dotted."""
    paths = []
    for name in HINTS:
        if name == ADAPTER:
            from loraplex.tuner.config import AdapterConfig

            paths += [f"{ADAPTER}.{key}" for key in AdapterConfig.own_fields()]
        elif name in SECTIONS:
            paths += [f"{name}.{entry.name}" for entry in dataclasses.fields(SECTIONS[name])]
        else:
            paths.append(name)
    return paths


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return YAML that `read_recipe` reads back to an equal recipe, every key spelled out."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, allow_unicode=True, width=120)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as JSON would hold it, every key spelled out; `recipe_from_mapping` reads it back."""
    values = {entry.name: getattr(recipe, entry.name) for entry in dataclasses.fields(recipe)}
    plain = {name: dataclasses.asdict(value) if name in SECTIONS else value for name, value in values.items()}
    if recipe.adapter is not None:
        given = recipe.adapter.to_dict()
        plain["adapter"] = {name: given[name] for name in recipe.adapter.own_fields()}
    found: dict[str, Any] = json.loads(json.dumps(plain, default=sorted))
    return found


def parse_overrides(tokens: Sequence[str]) -> dict[str, Any]:
    """Return {key: value} for the tokens ["--key", "value", "--key=value", ...]; values are read as YAML."""
    given: dict[str, Any] = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        key, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key:
            raise UserError(f"'{token}' is not an option: overrides are written --key value")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key} needs a value: --{key} VALUE")
            text = rest.pop(0)
        given[key.replace("-", "_")] = _load_yaml(text, f"--{key}")
    return given


def _read_text(path: Path) -> str:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        hint = nearest(str(path), [str(other) for other in (*folder.glob("*.y*ml"), *folder.glob("recipes/*.y*ml"))])
        raise UserError(f"there is no recipe '{path}'.{hint}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8: {error.reason} at byte {error.start}") from error


def _load_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None and "\n" in text else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{source}{line}: not valid YAML: {problem}") from error


def _flatten(mapping: Mapping[str, Any], known: list[str], source: str) -> Iterable[tuple[str, Any]]:
    """Yield (path, value) of every leaf; a section given as a plain value is the key of `SHORT_FORMS`."""
    sections = dict.fromkeys(path.partition(".")[0] for path in known if "." in path)
    for key, value in mapping.items():
        if key in sections and isinstance(value, Mapping):
            for name, leaf in value.items():
                path = f"{key}.{name}"
                if path not in known:
                    raise _unknown(path, known, source)
                yield path, leaf
        elif key in sections:
            if value is not None:
                yield _short_form(str(key), f"{source}: {key} is {value!r}"), value
        elif key in known:
            yield key, value
        else:
            raise _unknown(str(key), known, source)


def _spread(key: str, value: Any, known: list[str]) -> Iterable[tuple[str, Any]]:
    """Yield (path, value) of an override; several where it is a mapping of a section's keys."""
    if isinstance(value, Mapping) and value and all(f"{key}.{name}" in known for name in value):
        yield from ((f"{key}.{name}", leaf) for name, leaf in value.items())
    elif isinstance(value, Mapping) and key in SECTIONS and key not in SHORT_FORMS:
        raise next(
            _unknown(f"{key}.{name}", known, "command line", "--") for name in value if f"{key}.{name}" not in known
        )
    else:
        yield resolve_key(key, known), value


def _short_form(section: str, given: str) -> str:
    """Return the path of the key that a section given as a plain value means.

    Raises:
        UserError: when the section has no short form.
    """
    if section not in SHORT_FORMS:
        raise UserError(f"{given}: '{section}' is a section, give its keys ('loraplex train --help' lists them)")
    return f"{section}.{SHORT_FORMS[section]}"


def resolve_key(key: str, known: list[str]) -> str:
    """Return the dotted path of an override's key: itself, a section's short form, or the one key of that name."""
    if key in known:
        return key
    # Free mappings (training.trainer_args.x, adapter.rank_pattern.x) are set entry by entry.
    parent = next((path for path in known if key.startswith(path + ".")), None)
    if parent is not None:
        return key
    if any(path.startswith(key + ".") for path in known):
        return _short_form(key, f"--{key}")
    matches = [path for path in known if path.rpartition(".")[2] == key]
    if not matches:
        raise _unknown(key, known, "command line", dashes="--")
    if len(matches) > 1:
        raise UserError(f"--{key} is ambiguous: write " + " or ".join(f"--{path}" for path in matches))
    return matches[0]


def _unknown(path: str, known: list[str], source: str, dashes: str = "") -> UserError:
    section, _, name = path.rpartition(".")
    siblings = [other for other in known if other.rpartition(".")[0] == section]
    hint = nearest(path, siblings)
    if not hint:
        names = {other.rpartition(".")[2]: other for other in reversed(known)}
        hint = nearest(name, names)
        for short, full in names.items():
            hint = hint.replace(f"'{short}'", f"'{full}'")
    return UserError(f"{source}: unknown key '{dashes}{path}'.{hint}")


def _validate(flat: Mapping[str, tuple[Any, str]], source: str) -> Recipe:
    nested: dict[str, Any] = {}
    for path, (value, _) in flat.items():
        # What follows section and key belongs to a free mapping, whose own keys may have dots.
        *parents, name = path.split(".", 2)
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = dict(value) if isinstance(value, dict) else value
    try:
        # As JSON, because strict validation then takes a list for a tuple but no text for a number.
        return TypeAdapter(Recipe).validate_json(json.dumps(nested, default=str), strict=True)
    except ValidationError as failure:
        raise UserError(_explain(failure, flat, source)) from failure


def _explain(failure: ValidationError, flat: Mapping[str, tuple[Any, str]], source: str) -> str:
    """Return one line for the first thing wrong in `failure`."""
    errors = failure.errors(include_url=False)
    first = errors[0]
    path = _known_part(first["loc"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return f"{source}: {cause}"
    label = flat[path][1] if path in flat else f"{source}: {path}"
    if first["type"] == "missing":
        return f"{label} is missing: give it in the recipe or as --{path}"
    same = dict.fromkeys(_expected(error["msg"]) for error in errors if _known_part(error["loc"]) == path)
    value = flat[path][0] if path in flat else first["input"]
    choices = re.findall("'([^']*)'", first.get("ctx", {}).get("expected", ""))
    return f"{label} is {value!r}, expected {' or '.join(same)}.{nearest(str(value), choices)}"


def _known_part(location: Sequence[str | int]) -> str:
    """Return the dotted key of a pydantic location, without the branches of a union after it."""
    depth = 2 if location and location[0] in SECTIONS else 1
    return ".".join(str(part) for part in location[:depth])


def _expected(message: str) -> str:
    return message.removeprefix("Input should be ").removeprefix("Value error, ")


def _typed(recipe: Recipe, flat: Mapping[str, tuple[Any, str]]) -> Recipe:
    """Return the recipe with its adapter section as an `AdapterConfig`, the types of its fields checked."""
    section: Any = recipe.adapter or {}
    if recipe.peft:
        return dataclasses.replace(recipe, adapter=None)
    from loraplex.tuner.config import AdapterConfig

    hints = typing.get_type_hints(AdapterConfig, include_extras=True)
    for name, value in section.items():
        if name in ("adapter", "allocation", "objective"):
            # names and mappings of options, which the methods check themselves
            continue
        label = flat.get(f"adapter.{name}", (None, f"adapter.{name}"))[1]
        try:
            TypeAdapter(hints[name]).validate_json(json.dumps(value, default=str), strict=True)
        except ValidationError as failure:
            expected = dict.fromkeys(_expected(error["msg"]) for error in failure.errors(include_url=False))
            raise UserError(f"{label} is {value!r}, expected {' or '.join(expected)}.") from failure
    return dataclasses.replace(recipe, adapter=AdapterConfig(**section))
