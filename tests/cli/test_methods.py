"""`loraplex methods`: what it prints is what the registry holds."""

import json
import re
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import yaml

from loraplex import AdapterConfig
from loraplex.adapters.registry import Adapter, Axis, Capability, Method, incompatibility
from loraplex.cli.main import main
from loraplex.cli.methods import describe
from loraplex.methods import REGISTRY


@pytest.fixture
def description(capsys: pytest.CaptureFixture[str]) -> Any:
    """What `loraplex methods --json` printed."""
    assert main(["methods", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_holds_every_method_and_preset(description: Any) -> None:
    assert [entry["name"] for entry in description["adapters"]] == list(REGISTRY.presets)
    assert list(description["axes"]) == [axis.value for axis in Axis]
    for (axis, name), method in REGISTRY.methods.items():
        entry = next(entry for entry in description["axes"][axis] if entry["name"] == name)
        assert set(entry["needs"]) == {capability.value for capability in method.needs}
        assert set(entry["provides"]) == {capability.value for capability in method.provides}


def test_the_matrix_holds_every_pair_and_says_what_the_registry_says(description: Any) -> None:
    pairs = list(product(REGISTRY.members(Axis.FACTORS), REGISTRY.members(Axis.COMBINE)))
    assert len(description["matrix"]) == len(pairs)
    for row, (factors, combine) in zip(description["matrix"], pairs, strict=True):
        assert row["refused"] == incompatibility(factors, combine)
        if row["refused"] is None:
            adapter = Adapter(factors.options(), combine.options())
            assert (row["saved_as"], row["mergeable"]) == (adapter.save_format.value, adapter.mergeable)
            for other in REGISTRY.members(Axis.ALLOCATION):
                assert row["allocation"][other.name] == incompatibility(factors, combine, other)


def test_a_pair_that_is_refused_points_to_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True)
    class Picky:
        """Options of a method that needs what LoRA does not offer."""

    needs = frozenset({Capability.ROUTED})
    picky = Method("picky", Axis.COMBINE, Picky, "only heads", "–", "0", needs=needs)
    monkeypatch.setitem(REGISTRY.methods, (Axis.COMBINE, "picky"), picky)
    lora = REGISTRY.get(Axis.FACTORS, "lora")
    row = next(row for row in describe()["matrix"] if (row["factors"], row["combine"]) == ("lora", "picky"))
    assert row["refused"] == incompatibility(lora, picky)
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    (number,) = re.findall(rf"^\((\d+)\) {re.escape(row['refused'])}$", printed, re.MULTILINE)
    assert f"no ({number})" in printed


def test_the_tables_name_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    for method in REGISTRY.methods.values():
        assert method.name in printed
        assert method.summary in printed
    for capability in Capability:
        assert capability.value in printed


@pytest.mark.parametrize("name", [*REGISTRY.presets, *dict.fromkeys(name for _, name in REGISTRY.methods)])
def test_a_page_of_one_method_has_its_options_and_a_recipe_that_is_read(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["methods", name, "--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    assert all(option["what"] for option in page["options"])
    assert main(["methods", name]) == 0
    printed = capsys.readouterr().out
    assert page["recipe"] in printed
    assert all(option["what"].split()[0] in printed for option in page["options"])
    asked = yaml.safe_load(page["recipe"])["adapter"]
    config = AdapterConfig(**asked)
    methods = [*config.adapter.methods]
    methods += [REGISTRY.of_options(config.allocation), REGISTRY.of_options(config.objective)]
    assert set(page["parts"]) <= {f"{method.axis.value} {method.name}" for method in methods}


def test_a_method_that_is_not_there_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "hetro"]) == 1
    assert "there is no method 'hetro'" in (refusal := capsys.readouterr().err)
    assert "Did you mean 'hetero'?" in refusal
