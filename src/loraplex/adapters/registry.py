"""The registry: one frozen record per method, its capabilities as data, and the rule that tells which methods combine.

A method is legal together with others when everything it needs is provided by them. Nothing else decides.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from loraplex.errors import UserError, nearest


class Axis(StrEnum):
    """The four independent questions; factors and combine together are the adapter."""

    FACTORS = "factors"
    COMBINE = "combine"
    ALLOCATION = "allocation"
    OBJECTIVE = "objective"


class Capability(StrEnum):
    """What a method may offer to, or ask of, the methods it is combined with."""

    STATIC = "a weight change that is the same for every token"
    PAIR = "one pair (A, B) per site"
    GATES = "rank gates"
    SHRINKS = "parameters that go with closed ranks"
    ROUTED = "several heads per site"
    RANK_INPUT = "a rank space that takes additional input"
    SHARED = "tensors shared between sites"


class SaveFormat(StrEnum):
    """The form in which a finished adapter is saved."""

    LORA = "plain PEFT LoRA"
    DORA = "plain PEFT LoRA with use_dora"
    OWN = "loraplex's own type"


@dataclass(frozen=True)
class Method:
    """One member of one axis."""

    name: str
    axis: Axis
    options: type
    """Frozen dataclass of the method's options; it builds the method (`build`)."""
    summary: str
    paper: str
    parameters: str
    """Trainable parameters per site as a formula in r, in, out."""
    provides: frozenset[Capability] = frozenset()
    needs: frozenset[Capability] = frozenset()
    save_format: SaveFormat = SaveFormat.OWN
    """For factors and combine: the plainest exact form of the result; for an objective: that while it is attached."""
    mergeable: bool = True
    """Whether the result can be written into the frozen weight exactly."""
    default: bool = False
    """Whether this member is taken where none of its axis is named."""
    only_peft_model: str = ""
    """Why PEFT's tuner must stay around the model: what is lost or not checked when it is thrown away after injection.

    Empty where it need not."""


@dataclass(frozen=True)
class Preset:
    """A name for a combination of factors and combine, with the options that make it what it is."""

    name: str
    factors: str
    combine: str
    summary: str
    paper: str
    parameters: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that differ from their defaults."""
    default: bool = False
    """Whether this adapter is taken where none is named."""


@dataclass
class Registry:
    """All methods and presets, in the order of their registration."""

    methods: dict[tuple[Axis, str], Method] = field(default_factory=dict)
    presets: dict[str, Preset] = field(default_factory=dict)

    def add(self, entry: Method | Preset) -> None:
        """Register a method or preset; a second one of the same name is a programming error."""
        if isinstance(entry, Preset):
            assert entry.name not in self.presets, entry.name
            self.presets[entry.name] = entry
        else:
            key = (entry.axis, entry.name)
            assert key not in self.methods, key
            self.methods[key] = entry

    def members(self, axis: Axis) -> list[Method]:
        """Return the methods of one axis."""
        return [method for method in self.methods.values() if method.axis == axis]

    def get(self, axis: Axis, name: str) -> Method:
        """Return a method by name.

        Raises:
            UserError: when the axis has no such method; the message names the nearest.
        """
        try:
            return self.methods[axis, name]
        except (KeyError, TypeError):
            names = [method.name for method in self.members(axis)]
            hint = nearest(str(name), names)
            raise UserError(f"unknown {axis} '{name}': known are {', '.join(names)}.{hint}") from None

    def default(self, axis: Axis) -> Method:
        """Return the member of an axis that is taken where none is named."""
        return next(method for method in self.members(axis) if method.default)

    @property
    def default_preset(self) -> str:
        """The name of the adapter that is taken where none is named."""
        return next(preset.name for preset in self.presets.values() if preset.default)

    def of_options(self, options: object) -> Method:
        """Return the method whose options these are.

        Raises:
            UserError: when they are no method's.
        """
        for method in self.methods.values():
            if type(options) is method.options:
                return method
        raise UserError(f"{options!r} stands for no method: give a name, a mapping with a name, or an options object")


REGISTRY = Registry()


def incompatibility(*methods: Method) -> str | None:
    """Return the sentence that says why these methods do not combine, or None when they do."""
    for method in methods:
        others = [other for other in methods if other is not method]
        provided = {capability for other in others for capability in other.provides}
        for capability in sorted(method.needs - provided):
            names = " and ".join(f"'{other.name}'" for other in others)
            verb = "does" if len(others) == 1 else "do"
            return f"{method.axis} '{method.name}' needs {capability.value}, which {names} {verb} not offer"
    return None


@dataclass(frozen=True)
class Adapter:
    """The adapter axis, typed: options of the factors and of the combine.

    Example: `Adapter(LoRA(use_rslora=True), Magnitude())` is DoRA with the scale of rsLoRA.
    """

    factors: Any
    combine: Any

    def __post_init__(self) -> None:
        """Refuse combinations that the capability flags do not allow."""
        reason = incompatibility(*self.methods)
        if reason is not None:
            raise UserError(f"this adapter is not possible: {reason}")

    @property
    def methods(self) -> tuple[Method, Method]:
        """The records of factors and combine."""
        return REGISTRY.of_options(self.factors), REGISTRY.of_options(self.combine)

    @property
    def save_format(self) -> SaveFormat:
        """The form in which the finished adapter is saved."""
        # an option may change what the record says of the method
        if getattr(self.factors, "save_format", self.methods[0].save_format) is SaveFormat.OWN:
            return SaveFormat.OWN
        return self.methods[1].save_format

    @property
    def peft_format(self) -> SaveFormat:
        """The form that the finished adapter takes once its pairs are written out: PEFT's, where there is one."""
        factors, combine = self.methods
        return combine.save_format if Capability.PAIR in factors.provides else SaveFormat.OWN

    @property
    def only_peft_model(self) -> str:
        """Why PEFT's tuner must stay around the model, empty where it need not."""
        return " and ".join(method.only_peft_model for method in self.methods if method.only_peft_model)

    @property
    def mergeable(self) -> bool:
        """Whether both parts can be merged into the frozen weight exactly."""
        return all(method.mergeable for method in self.methods)

    @property
    def name(self) -> str:
        """What the adapter is called in messages: its preset's name, or its parts and the options that were changed."""
        found = self.describe()
        return found if isinstance(found, str) else json.dumps(found)

    def describe(self) -> str | dict[str, Any]:
        """Return what `parse_adapter` reads back: a preset's name, or a mapping with the options that were changed."""
        factors, combine = self.methods
        options = {**_options(self.factors), **_options(self.combine)}
        defaults = {**_options(factors.options()), **_options(combine.options())}
        names = [
            (preset.name, _changed(options, {**defaults, **preset.options}))
            for preset in REGISTRY.presets.values()
            if (preset.factors, preset.combine) == (factors.name, combine.name)
        ]
        if not names:
            return {"factors": factors.name, "combine": combine.name, **_changed(options, defaults)}
        # the preset that says most of it
        name, changed = min(names, key=lambda entry: len(entry[1]))
        return {"name": name, **changed} if changed else name


def parse_adapter(value: Adapter | str | Mapping[str, Any] | object) -> Adapter:
    """Return the typed adapter for a preset's name, a mapping (name or factors and combine, plus options) or options.

    Raises:
        UserError: for an unknown name or option (the nearest is named) or a combination that is not legal.
    """
    if isinstance(value, Adapter):
        return value
    if isinstance(value, str):
        return _from_mapping({"name": value})
    if isinstance(value, Mapping):
        return _from_mapping(value)
    method = REGISTRY.of_options(value)
    if method.axis is Axis.FACTORS:
        return Adapter(value, REGISTRY.default(Axis.COMBINE).options())
    if method.axis is Axis.COMBINE:
        return Adapter(REGISTRY.default(Axis.FACTORS).options(), value)
    raise UserError(f"'{method.name}' is of the axis {method.axis}, not an adapter")


def _from_mapping(value: Mapping[str, Any]) -> Adapter:
    rest = dict(value)
    if "name" in rest:
        name = rest.pop("name")
        if name not in REGISTRY.presets:
            known = ", ".join(REGISTRY.presets)
            raise UserError(f"unknown adapter '{name}': known are {known}.{nearest(str(name), REGISTRY.presets)}")
        preset = REGISTRY.presets[name]
        factors, combine = preset.factors, preset.combine
        rest = {**preset.options, **rest}
    else:
        defaults = (REGISTRY.default(axis).name for axis in (Axis.FACTORS, Axis.COMBINE))
        factors, combine = (rest.pop(key, name) for key, name in zip(("factors", "combine"), defaults, strict=True))
    classes = [REGISTRY.get(Axis.FACTORS, factors).options, REGISTRY.get(Axis.COMBINE, combine).options]
    fields = [{entry.name for entry in dataclasses.fields(options)} for options in classes]
    for key in rest:
        if not any(key in names for names in fields):
            hint = nearest(key, set().union(*fields) | {"name", "factors", "combine"})
            raise UserError(f"unknown adapter option '{key}' for factors '{factors}' with combine '{combine}'.{hint}")
    built = [cls(**{k: v for k, v in rest.items() if k in names}) for cls, names in zip(classes, fields, strict=True)]
    return Adapter(*built)


def parse_member(axis: Axis, value: Any) -> Any:
    """Return the options of the member of `axis` that a name, a mapping (name and options) or options stand for.

    Raises:
        UserError: for an unknown name or option (the nearest is named), or options of another axis.
    """
    if not isinstance(value, (str, Mapping)):
        method = REGISTRY.of_options(value)
        if method.axis is not axis:
            raise UserError(f"'{method.name}' is of the axis {method.axis}, not of the axis {axis}")
        return value
    rest = {"name": value} if isinstance(value, str) else dict(value)
    if "name" not in rest:
        raise UserError(
            f"{axis} is {value!r}, without a name: add one, such as name: {REGISTRY.members(axis)[-1].name}"
        )
    method = REGISTRY.get(axis, rest.pop("name"))
    names = [entry.name for entry in dataclasses.fields(method.options)]
    for key in rest:
        if key not in names:
            raise UserError(f"unknown option '{key}' of {axis} '{method.name}'.{nearest(str(key), names)}")
    return method.options(**rest)


def describe_member(options: Any) -> str | dict[str, Any]:
    """Return what `parse_member` reads back: a method's name, or a mapping with the options that were changed."""
    method = REGISTRY.of_options(options)
    changed = _changed(_options(options), _options(method.options()))
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
    return {"name": method.name, **plain} if plain else method.name


def _options(options: Any) -> dict[str, Any]:
    return {entry.name: getattr(options, entry.name) for entry in dataclasses.fields(options)}


def _changed(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value != defaults[name]}
