"""The fields of an adapter's configuration, typed, with what follows from them alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import partial
from typing import Any, Generic, Literal, TypeVar, cast, overload

from peft import PeftConfig

from loraplex.adapters.contracts import check_rank
from loraplex.adapters.registry import (
    Adapter,
    Axis,
    SaveFormat,
    describe_member,
    incompatibility,
    parse_adapter,
    parse_member,
)
from loraplex.allocation.contracts import Allocator
from loraplex.allocation.sites import is_edge
from loraplex.compat.peft import matching_pattern
from loraplex.errors import UserError, nearest
from loraplex.methods import REGISTRY
from loraplex.objectives.contracts import ObjectiveOptions
from loraplex.option_values import is_number
from loraplex.tuner.state import AdapterState

T = TypeVar("T")


class LoraplexType(StrEnum):
    """Our member beside PEFT's `PeftType`; PEFT and transformers read its `value`."""

    LORAPLEX = "LORAPLEX"


class Typed(Generic[T]):
    """A field that holds typed options, whatever form they come in: a name, a mapping or the options themselves."""

    def __init__(self, parse: Callable[[Any], T], default: str) -> None:
        self.parse, self.default = parse, default

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Tell pydantic, where it reads a recipe's fields, that any value may be given: methods check their own."""
        from pydantic_core import core_schema

        return core_schema.any_schema()

    def __set_name__(self, owner: type, name: str) -> None:
        """Remember the field's name."""
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> str: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> T | str:
        """Return the options; on the class the field's default, which `dataclass` asks for."""
        if instance is None:
            return self.default
        options: T = instance.__dict__[self.name]
        return options

    def __set__(self, instance: object, value: Any) -> None:
        """Parse and keep the options.

        Raises:
            UserError: for an unknown name or option, or a value out of range.
        """
        instance.__dict__[self.name] = self.parse(value)


@dataclass
class AdapterOptions(PeftConfig):
    """The fields of `AdapterConfig`, which adds how it is written and read."""

    adapter: Typed[Adapter] = Typed(parse_adapter, REGISTRY.default_preset)
    """The adapter: options such as DoRA(), a preset's name ('lora', 'dora'), or a mapping (a name, or factors and
    combine, with options)."""
    r: int = field(default=8)
    """Rank of every site that `rank_pattern` does not name."""
    lora_alpha: float = field(default=16)
    """Scale numerator: s = lora_alpha/r, lora_alpha/√r with rsLoRA."""
    target_modules: list[str] | str | None = field(default=None)
    """Module names (suffixes), one regular expression over full names, or 'all-linear'."""
    exclude_modules: list[str] | str | None = field(default=None)
    """Names or a regular expression to leave out."""
    lora_dropout: float = field(default=0.0)
    """Dropout on the input of A."""
    bias: Literal["none", "all", "lora_only"] = field(default="none")
    """Which biases of the base model train as well."""
    modules_to_save: list[str] | None = field(default=None)
    """Modules that are trained in full and saved with the adapter (a classification head)."""
    layers_to_transform: list[int] | int | None = field(default=None)
    """Indices of the blocks to adapt; all when absent."""
    layers_pattern: list[str] | str | None = field(default=None)
    """Name of the module list that `layers_to_transform` counts."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks by regular expression over module names."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Values of `lora_alpha` by regular expression over module names."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(default=None)
    """Rows of the embedding that train as well."""
    init_lora_weights: bool = field(default=True)
    """False starts away from the identity, for tests."""
    seed: int | None = field(default=None)
    """Seed of the initialization; drawn from torch's generator and kept when absent."""
    padding_free: bool | Literal["auto"] = field(default="auto")
    """Take the padding out of training batches: False never, 'auto' where the model allows, True or refuse."""
    allocation: Typed[Allocator] = Typed(partial(parse_member, Axis.ALLOCATION), REGISTRY.default(Axis.ALLOCATION).name)
    """Where the ranks go: options such as HeteroLoRA(...), a name, or a mapping (name and options)."""
    objective: Typed[ObjectiveOptions] = Typed(
        partial(parse_member, Axis.OBJECTIVE), REGISTRY.default(Axis.OBJECTIVE).name
    )
    """What is minimized while training: options such as EchoLoRA(...), a name ('plain', 'echo'), or a mapping."""

    @classmethod
    def own_fields(cls) -> list[str]:
        """Return the names of the fields that PEFT's own configs do not all have: the keys of a recipe's section."""
        return [entry.name for entry in fields(cls) if entry.name not in {other.name for other in fields(PeftConfig)}]

    def __post_init__(self) -> None:
        """Normalize and check; see the class."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = cast(Any, LoraplexType.LORAPLEX)
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = cast(Any, set(self.target_modules))
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = cast(Any, set(self.exclude_modules))
        members = (REGISTRY.of_options(self.allocation), REGISTRY.of_options(self.objective))
        reason = incompatibility(*self.adapter.methods, *members)
        if reason is not None:
            raise UserError(f"this combination is not possible: {reason}")
        self._check_values()
        self.bind(AdapterState())

    def bind(self, state: AdapterState) -> None:
        """Refer to the state that a tuner keeps of this adapter."""
        self.__dict__["_state"] = state

    @property
    def state(self) -> AdapterState:
        """What the tuner that hosts the adapter knows of it beside these fields."""
        state: AdapterState = self.__dict__["_state"]
        return state

    def _check_expressions(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                _check_expression(name, value)
            elif value is not None and not (isinstance(value, set) and all(isinstance(part, str) for part in value)):
                raise UserError(f"{name} is {value!r}: give a list of module names or one regular expression")
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                _check_expression(name, pattern)

    def _check_values(self) -> None:
        self._check_expressions()
        check_rank("the adapter (r)", self.r)
        for pattern, rank in self.rank_pattern.items():
            check_rank(f"'{pattern}' (rank_pattern)", rank)
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if not is_number(alpha) or not 0 < alpha < math.inf:
                raise UserError(f"alpha of '{name}' is {alpha!r}: give a number above 0")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout is {self.lora_dropout!r}: give a number from 0 to below 1")
        if self.bias not in ("none", "all", "lora_only"):
            raise UserError(f"bias is {self.bias!r}: choose 'none', 'all' or 'lora_only'")
        if self.padding_free not in (True, False, "auto"):
            raise UserError(f"padding_free is {self.padding_free!r}: choose true, false or 'auto'")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError("layers_pattern is given without layers_to_transform: give both or neither")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise UserError("layers_to_transform needs target_modules as a list of names, not as one expression")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, as adapter_config.json has them: typed options by name and mapping."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["adapter"] = self.adapter.describe()
        for name in ("allocation", "objective"):
            values[name] = describe_member(values[name])
        return values

    @property
    def save_format(self) -> SaveFormat:
        """The form in which this adapter is saved now: its own type as long as it is live or an objective attached."""
        attached = REGISTRY.of_options(self.objective).save_format is SaveFormat.OWN
        return SaveFormat.OWN if self.state.live or attached or self.has_shortcuts else self.adapter.save_format

    @property
    def has_shortcuts(self) -> bool:
        """Whether there are shortcuts, and no finished allocation has closed them all."""
        if self.state.finished_ranks is None:
            return self.allocation.edges is not None
        return any(rank > 0 for site, rank in self.state.finished_ranks.items() if is_edge(site))

    @property
    def only_peft_model(self) -> str:
        """Why PEFT's tuner must stay around the model, empty where it need not."""
        objective = REGISTRY.of_options(self.objective).only_peft_model
        edges = "its shortcuts are no modules of the base model" if self.allocation.edges is not None else ""
        return " and ".join(reason for reason in (self.adapter.only_peft_model, objective, edges) if reason)

    def rank_of(self, site: str) -> int:
        """Return the rank configured for a full module name, or that of a residual edge."""
        edges = self.allocation.edges if is_edge(site) else None
        default = self.r if edges is None else edges.r
        return self.rank_pattern.get(matching_pattern(self.rank_pattern, site), default)

    def alpha_of(self, site: str) -> float:
        """Return the alpha configured for a full module name, or that of a residual edge."""
        edges = self.allocation.edges if is_edge(site) else None
        default = self.lora_alpha if edges is None else edges.alpha
        return self.alpha_pattern.get(matching_pattern(self.alpha_pattern, site), default)

    def alpha_at(self, site: str, rank: int) -> float:
        """Return the alpha that gives `rank` ranks the scale that the site has at its configured rank."""
        own = self.rank_of(site)
        if rank == own:
            return self.alpha_of(site)
        # a shortcut is a pair of LoRA whatever the adapter is
        adapter = parse_adapter(REGISTRY.default_preset) if is_edge(site) else self.adapter
        found: float = self.alpha_of(site) * adapter.factors.scale(1, own) / adapter.factors.scale(1, rank)
        return found

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse keys that this version does not know, instead of dropping them."""
        known = {entry.name for entry in fields(cls)}
        refuse_unknown(kwargs, known)
        return kwargs


def _check_expression(field_name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise UserError(f"{field_name}: '{expression}' is not a regular expression ({error})") from None


def refuse_unknown(keys: Iterable[str], known: set[str]) -> None:
    """Raise a UserError for the first key that is not known, naming the nearest that is."""
    for key in keys:
        if key not in known:
            raise UserError(f"adapter_config.json has an unknown key '{key}'.{nearest(key, known)}")
