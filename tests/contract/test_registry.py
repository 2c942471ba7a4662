"""The registry: every record is complete, has an oracle and a recipe, and illegal combinations say why."""

import dataclasses
import importlib
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.contract.sites import adapters, variants

from loraplex import Adapter, LoRA, Magnitude, UserError
from loraplex.adapters.registry import (
    Axis,
    Capability,
    Method,
    SaveFormat,
    describe_member,
    incompatibility,
    parse_adapter,
    parse_member,
)
from loraplex.methods import REGISTRY

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("method", REGISTRY.methods.values(), ids=lambda m: f"{m.axis}-{m.name}")
def test_every_record_is_complete(method):
    assert method.summary
    assert method.paper
    assert method.parameters
    assert method.options() == method.options()
    if method.axis in (Axis.FACTORS, Axis.COMBINE):
        assert variants(method)
    if method.axis is Axis.OBJECTIVE and method.save_format is SaveFormat.OWN:
        assert importlib.import_module(f"tests.reference.{method.name}").loss
        assert (ROOT / "recipes" / f"{method.name}.yaml").is_file()


@pytest.mark.parametrize("name", REGISTRY.presets)
def test_every_preset_parses_has_a_recipe_and_describes_itself(name):
    adapter = parse_adapter(name)
    assert adapter.describe() == name
    assert (ROOT / "recipes" / f"{name}.yaml").is_file()


@pytest.mark.parametrize("adapter", adapters(), ids=str)
def test_description_reads_back(adapter):
    assert parse_adapter(adapter.describe()) == adapter


def test_options_alone_stand_for_an_adapter():
    assert parse_adapter(LoRA(use_rslora=True)).describe() == {"name": "lora", "use_rslora": True}
    assert parse_adapter(Magnitude()) == Adapter(LoRA(), Magnitude())
    assert parse_adapter({"factors": "lora", "combine": "magnitude"}).describe() == "dora"


def test_unknown_names_and_options_name_the_nearest():
    with pytest.raises(UserError, match=r"unknown adapter 'dorra'.*'dora'"):
        parse_adapter("dorra")
    with pytest.raises(UserError, match=r"unknown adapter option 'use_rslorra'.*'use_rslora'"):
        parse_adapter({"name": "lora", "use_rslorra": True})
    with pytest.raises(UserError, match=r"unknown combine 'magnitud'.*'magnitude'"):
        parse_adapter({"combine": "magnitud"})


def test_an_illegal_combination_says_what_is_missing():
    @dataclass(frozen=True)
    class Options:
        pass

    routed = Method(
        "routed", Axis.FACTORS, Options, "-", "-", "0", provides=frozenset({Capability.ROUTED, Capability.PAIR})
    )
    reason = incompatibility(routed, REGISTRY.get(Axis.COMBINE, "magnitude"))
    assert reason == (
        "combine 'magnitude' needs a weight change that is the same for every token, which 'routed' does not offer"
    )


@pytest.mark.parametrize("method", REGISTRY.members(Axis.OBJECTIVE), ids=lambda m: m.name)
def test_an_objectives_options_are_described_and_read_back(method):
    assert describe_member(method.options()) == method.name
    assert parse_member(Axis.OBJECTIVE, method.name) == method.options()
    assert parse_member(Axis.OBJECTIVE, method.options()) == method.options()
    for entry in dataclasses.fields(method.options):
        if isinstance(entry.default, float):
            changed = method.options(**{entry.name: entry.default / 2})
            assert describe_member(changed) == {"name": method.name, entry.name: entry.default / 2}
            assert parse_member(Axis.OBJECTIVE, describe_member(changed)) == changed


def test_an_objective_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"unknown objective 'eco'.*'echo'"):
        parse_member(Axis.OBJECTIVE, "eco")
    with pytest.raises(UserError, match=r"unknown option 'probabilty' of objective 'echo'.*'probability'"):
        parse_member(Axis.OBJECTIVE, {"name": "echo", "probabilty": 1})
    with pytest.raises(UserError, match="without a name: add one"):
        parse_member(Axis.OBJECTIVE, {"probability": 1})
    with pytest.raises(UserError, match="'lora' is of the axis factors, not of the axis objective"):
        parse_member(Axis.OBJECTIVE, LoRA())


def test_an_objective_that_needs_the_rank_space_is_refused_without():
    @dataclass(frozen=True)
    class Options:
        pass

    closed = Method("closed", Axis.FACTORS, Options, "-", "-", "0", provides=frozenset({Capability.PAIR}))
    reason = incompatibility(closed, REGISTRY.get(Axis.COMBINE, "magnitude"), REGISTRY.get(Axis.OBJECTIVE, "echo"))
    assert "objective 'echo' needs a rank space that takes additional input" in str(
        incompatibility(closed, REGISTRY.get(Axis.OBJECTIVE, "echo"))
    )
    assert reason is not None
