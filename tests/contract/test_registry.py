"""The registry: every record is complete, has an oracle and a recipe, and illegal combinations say why."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.contract.sites import adapters, variants

from loraplex import Adapter, LoRA, Magnitude, UserError
from loraplex.adapters.registry import Axis, Capability, Method, illegal, parse_adapter
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
    reason = illegal(routed, REGISTRY.get(Axis.COMBINE, "magnitude"))
    assert reason == (
        "combine 'magnitude' needs a weight change that is the same for every token, which 'routed' does not offer"
    )
