"""Options that the training rows decide: a stand-in for a method with such an option, from recipe to run folder."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from loraplex.adapters.contracts import Resolved, ResolvesFromData, SiteInit
from loraplex.adapters.lora import LoRA
from loraplex.adapters.registry import REGISTRY, Axis
from loraplex.cli.main import main
from loraplex.comparison.compare import _resolved, _Sweep
from loraplex.comparison.comparison_recipe import read_comparison
from loraplex.comparison.workers import Workers
from loraplex.errors import UserError
from loraplex.training import preparation
from loraplex.training.reading import read_recipe
from loraplex.training.run import train


@dataclasses.dataclass(frozen=True)
class Counting(LoRA):
    """LoRA with an option that means nothing: the number of different prompts."""

    prompts: Any = 1

    def resolve_from_data(self, texts: Callable[[], Sequence[str]], seed: int) -> Resolved | None:
        if self.prompts != "auto":
            return None
        number = len(set(texts()))
        return Resolved(
            dataclasses.replace(self, prompts=number), f"prompts: {number}", {"prompts": number, "seed": seed}
        )

    def build(self, site: SiteInit) -> Any:
        if self.prompts == "auto":
            raise UserError("prompts is 'auto': give a number where there are no training rows")
        return super().build(site)


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the stand-in for the length of a test."""
    record = dataclasses.replace(REGISTRY.get(Axis.FACTORS, "lora"), name="counting", options=Counting)
    monkeypatch.setitem(REGISTRY.methods, (Axis.FACTORS, "counting"), record)


@pytest.fixture
def recipe(tiny_recipe: Path) -> Path:
    """Train with the option left open."""
    text = tiny_recipe.read_text()
    assert "adapter: lora, " in text
    tiny_recipe.write_text(text.replace("adapter: lora, ", "adapter: {factors: counting, prompts: auto}, "))
    return tiny_recipe


def prompts(recipe: Path) -> set[str]:
    rows = recipe.with_name("rows.jsonl").read_text().splitlines()
    return {json.loads(row)["question"] for row in rows}


def test_a_run_decides_says_and_keeps_it(recipe: Path, tiny_model: Path) -> None:
    said: dict[str, str] = {}
    result = train(read_recipe(recipe), say=said.__setitem__)
    number = len(prompts(recipe))
    assert said["decided"] == f"prompts: {number}"
    written = read_recipe(result.folder / "recipe.yaml")
    assert written.adapter.to_dict()["adapter"] == {"factors": "counting", "combine": "add", "prompts": number}
    assert written.adapter.r == 2
    assert json.loads((result.folder / "decided.json").read_text()) == [{"prompts": number, "seed": 0}]


def test_a_run_goes_on_with_what_was_decided(recipe: Path) -> None:
    result = train(read_recipe(recipe))
    result.folder.joinpath("metrics.json").unlink()
    again = train(read_recipe(recipe), resume=True)
    assert again.metrics["loss"] == result.metrics["loss"]
    other = read_recipe(recipe, ["--adapter", "{factors: counting, prompts: 3}"])
    again.folder.joinpath("metrics.json").unlink()
    with pytest.raises(UserError, match="cannot resume"):
        train(other, resume=True)


def test_a_full_folder_is_refused_before_the_rows_are_read(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = read_recipe(recipe)
    Path(loaded.output).mkdir()
    Path(loaded.output, "kept").write_text("x")
    monkeypatch.setattr(preparation, "read_examples", None)
    with pytest.raises(UserError, match="is not empty"):
        train(loaded)


def test_rows_held_out_have_no_part_in_it(recipe: Path) -> None:
    options = ["--training.validation_rows", "10"]
    settled, (choice,) = preparation.resolve_from_data(read_recipe(recipe, options))
    train_rows, held_out = preparation.training_examples(settled)
    assert len(held_out) == 10
    assert choice.evidence["prompts"] == len({example.asked for example in train_rows})
    assert preparation.resolve_from_data(settled) == (settled, [])


def test_nothing_is_read_where_nothing_is_open(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "read_examples", None)
    for adapter in ("lora", "{factors: counting, prompts: 3}"):
        loaded = read_recipe(recipe, ["--adapter", adapter])
        assert preparation.resolve_from_data(loaded) == (loaded, [])
    stock = dataclasses.replace(loaded, adapter=None, peft={"peft_type": "LORA"})
    assert preparation.resolve_from_data(stock) == (stock, [])


def test_plan_decides_too(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe)]) == 0
    assert capsys.readouterr().out.startswith(f"decided: prompts: {len(prompts(recipe))}\n")
    assert main(["plan", str(recipe), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["trainable"] > 0
    assert "decided: prompts" in captured.err


def test_every_arm_of_a_comparison_is_decided_before_it_is_counted(recipe: Path) -> None:
    text = recipe.read_text().replace("adapter: {adapter: {factors: counting, prompts: auto}, ", "adapter: {")
    recipe.write_text(
        text + "seeds: [0]\narms: {plain: lora, open: {adapter: {adapter: {factors: counting, prompts: auto}}}}\n"
    )
    said: list[tuple[str, str]] = []
    sweep = _Sweep(read_comparison(recipe), lambda topic, words: said.append((topic, words)), False, Workers())
    arms = _resolved(sweep).arms
    number = len(prompts(recipe))
    assert said == [("decided", f"open: prompts: {number}")]
    assert arms["open"].adapter.to_dict()["adapter"] == {"factors": "counting", "combine": "add", "prompts": number}
    assert arms["plain"].adapter.to_dict()["adapter"] == "lora"


def test_without_rows_it_stays_open_and_says_so(tiny_model: Path) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from loraplex import AdapterConfig

    config = AdapterConfig(adapter={"factors": "counting", "prompts": "auto"}, target_modules=["q_proj"])
    assert isinstance(config.adapter.factors, ResolvesFromData)
    assert not isinstance(config.adapter.combine, ResolvesFromData)
    with pytest.raises(UserError, match="prompts is 'auto': give a number"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
