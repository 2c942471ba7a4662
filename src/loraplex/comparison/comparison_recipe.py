"""The recipe of a comparison: a training recipe without output and seed, and what is compared, in keys of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from loraplex.errors import UserError, nearest
from loraplex.training.reading import known_paths, load_mapping, parse_overrides, recipe_from_mapping, resolve_key
from loraplex.training.recipe import SHORT_FORMS, Recipe

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Options = TypeVar("Options")
# What an arm may be called: its name is part of file names and of command lines.
ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class ArmOptions:
    """What one arm changes in the shared recipe."""

    adapter: Any = None
    """Adapter section; its keys replace those of the shared one."""
    peft: dict[str, Any] = field(default_factory=dict)
    """A configuration of stock PEFT instead of an adapter of ours."""
    training: dict[str, Any] = field(default_factory=dict)
    """Keys of the training section."""
    learning_rates: list[Positive] | None = None
    """Learning rates to choose from on validation rows; replaces the shared list, [] takes the given one."""
    compute_of: str | None = None
    """Another arm: this one gets as many steps as have that one's training FLOPs."""
    one_per_group: Annotated[int, Field(ge=2)] | Literal["auto"] | None = None
    """An adapter of its own for each of so many groups of prompts, each of them asked the items of its group; they
    share the arm's budget and its steps. "auto": as many groups as `loraplex heads` suggests."""


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, how often, and under which budget."""

    arms: dict[str, Any]
    """Name -> what this arm changes in the shared recipe: adapter or peft, training, learning_rates."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = field(default_factory=lambda: [0, 1, 2])
    """One run per arm and seed."""
    reference: str | None = None
    """The arm that the others are compared with; the first one when absent."""
    budget: str | float | None = None
    """Trainable parameters of every arm: 0.5% of the model, 1.2M, or a number. Ranks are solved, the scale is kept."""
    match: str | None = None
    """An adapter with its options whose parameters are the budget: 'lora r=16'; or 'compute': equal training FLOPs."""
    learning_rates: list[Positive] = field(default_factory=list)
    """Learning rates to choose from, once per arm, on training.validation_rows; absent: training.learning_rate."""
    jobs: Annotated[int, Field(gt=0)] | None = None
    """Runs at the same time; absent: one for every eight cores, and one on an accelerator."""

    def __post_init__(self) -> None:
        """Check what one field asks of another."""
        if not self.arms:
            raise UserError("arms is empty: name at least one way of adapting the model")
        for name in self.arms:
            if not ARM_NAME.fullmatch(name):
                raise UserError(f"arms.{name}: an arm's name is made of letters, digits and . _ + -")
        if self.reference is not None and self.reference not in self.arms:
            raise UserError(
                f"reference is '{self.reference}', which is not an arm.{nearest(self.reference, self.arms)}"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds is {self.seeds}: give at least one, and each of them once")
        if self.budget is not None and self.match not in (None, "compute"):
            raise UserError("budget and match both say how many parameters an arm has: give one of them")


@dataclass(frozen=True)
class ComparisonRecipe:
    """A checked comparison: the arms as training recipes, before any rank or learning rate is solved."""

    path: Path
    output: Path
    description: str
    """The comment at the head of the file."""
    options: CompareOptions
    arms: dict[str, Recipe]
    learning_rates: dict[str, list[float]]
    """By arm; empty where the rate is given."""
    own_rank: frozenset[str]
    """Arms that name their rank themselves and keep it, whatever the budget."""
    compute_of: dict[str, str]
    """Arms whose number of steps follows from another's operations, and that other arm."""
    groups: dict[str, int | Literal["auto"]]
    """Arms with one adapter per group of prompts, and the number of groups."""

    @property
    def reference(self) -> str:
        """The arm that the others are compared with."""
        return self.options.reference or next(iter(self.arms))


def read_comparison(path: str | Path, overrides: Sequence[str] = ()) -> ComparisonRecipe:
    """Return the comparison in the YAML file `path`; overrides are keys of the comparison or of the shared recipe.

    Raises:
        UserError: one line that names the file, the key, the value and what is expected.
    """
    path = Path(path)
    text, mapping = load_mapping(path)
    known = [entry.name for entry in fields(CompareOptions)]
    shared = {key: value for key, value in mapping.items() if key not in known}
    for key, value in parse_overrides(overrides).items():
        if key in known:
            mapping[key] = value
        else:
            _set(shared, resolve_key(key, known_paths()), value)
    _refuse_unknown(shared, known, str(path))
    if "arms" not in mapping:
        raise UserError(f"{path}: arms is missing: name the ways of adapting the model that are compared")
    if "seed" in shared:
        raise UserError(f"{path}: a comparison has seeds, not a seed")
    options = _validated(CompareOptions, {key: mapping[key] for key in known if key in mapping}, str(path))
    arms, rates, own_rank, compute_of = {}, {}, set(), {}
    groups: dict[str, int | Literal["auto"]] = {}
    for name, changes in options.arms.items():
        arm = _arm(changes, f"{path}: arms.{name}")
        arms[name] = recipe_from_mapping(_merged(shared, arm), source=f"{path}: arms.{name}")
        rates[name] = options.learning_rates if arm.learning_rates is None else arm.learning_rates
        if rates[name] and not arms[name].training.validation_rows:
            raise UserError(f"{path}: learning_rates needs rows to choose on: set training.validation_rows above 0")
        if isinstance(arm.adapter, Mapping) and {"r", "rank_pattern"} & set(arm.adapter):
            own_rank.add(name)
        if arm.compute_of is not None:
            compute_of[name] = arm.compute_of
        if arm.one_per_group is not None:
            groups[name] = arm.one_per_group
    _check_groups(groups, compute_of, options, str(path))
    _check_compute(compute_of, options, str(path))
    output = Path(arms[next(iter(arms))].output)
    return ComparisonRecipe(path, output, _heading(text), options, arms, rates, frozenset(own_rank), compute_of, groups)


def _check_groups(
    groups: Mapping[str, Any], compute_of: Mapping[str, str], options: CompareOptions, source: str
) -> None:
    for name in groups:
        if options.match == "compute" or name in compute_of or name in compute_of.values():
            raise UserError(
                f"{source}: arms.{name}.one_per_group goes with a number of steps of its own: leave equal compute out"
            )


def _check_compute(compute_of: Mapping[str, str], options: CompareOptions, source: str) -> None:
    for name, other in compute_of.items():
        if other not in options.arms or other == name or other in compute_of:
            known = [arm for arm in options.arms if arm not in compute_of]
            raise UserError(
                f"{source}: arms.{name}.compute_of is '{other}': name an arm whose steps are given, such as "
                f"{known[0] if known else 'a new one'}.{nearest(other, known)}"
            )
        if options.match == "compute":
            raise UserError(
                f"{source}: arms.{name}.compute_of beside match: compute, which says it for all: leave one out"
            )


def _refuse_unknown(shared: Mapping[str, Any], known: list[str], source: str) -> None:
    top = {*known, *(path.partition(".")[0] for path in known_paths())}
    for key in shared:
        if key not in top:
            raise UserError(f"{source}: unknown key '{key}'.{nearest(str(key), top)}")


def _validated(kind: type[Options], mapping: Mapping[str, Any], source: str) -> Options:
    """Return the options in a mapping; as JSON, because strict validation then takes a list for a tuple."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(dict(mapping), default=str), strict=True)
    except ValidationError as failure:
        raise _explained(failure, source) from failure


def _arm(changes: Any, source: str) -> ArmOptions:
    if isinstance(changes, str):
        changes = {"adapter": changes}
    if changes is None:
        changes = {}
    if not isinstance(changes, Mapping):
        raise UserError(f"{source} is {changes!r}: give an adapter's name, or a mapping with adapter, peft or training")
    names = [entry.name for entry in fields(ArmOptions)]
    for key in changes:
        if key not in names:
            raise UserError(f"{source}: unknown key '{key}'.{nearest(str(key), names)}")
    return _validated(ArmOptions, changes, source)


def _explained(failure: ValidationError, source: str) -> UserError:
    first = failure.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return UserError(f"{source}: {cause}")
    key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("str", "float", "constrained")))
    return UserError(f"{source}: {key} is {first['input']!r}, expected {first['msg'].removeprefix('Input should be ')}")


def _merged(shared: Mapping[str, Any], arm: ArmOptions) -> dict[str, Any]:
    """Return the mapping of an arm's training recipe."""
    merged = {key: value for key, value in shared.items() if key != "peft"}
    merged["training"] = {**(shared.get("training") or {}), **arm.training}
    if arm.peft:
        merged.pop("adapter", None)
        merged["peft"] = arm.peft
        return merged
    common, own = _section(shared.get("adapter")), _section(arm.adapter)
    merged["adapter"] = {**common, **own}
    return merged


def _section(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {"adapter": value}


def _set(shared: dict[str, Any], path: str, value: Any) -> None:
    section, _, name = path.partition(".")
    if not name:
        shared[section] = value
        return
    entry = shared.get(section)
    if not isinstance(entry, dict):
        entry = {} if entry is None else {SHORT_FORMS[section]: entry}
    shared[section] = {**entry, name: value}


def _heading(text: str) -> str:
    """Return the comment lines at the head of a file, up to the first empty one."""
    lines = []
    for line in text.splitlines():
        content = line.removeprefix("#").strip()
        if not line.startswith("#") or not content:
            break
        lines.append(content)
    return " ".join(lines)
