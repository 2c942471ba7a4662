"""Runs with an objective: from the recipe to plain LoRA, counted as what they cost, estimated, resumed."""

import dataclasses
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loraplex.comparison.budget_matching import Counter
from loraplex.training.estimate import estimate
from loraplex.training.preparation import read_rows, resolve
from loraplex.training.reading import read_recipe
from loraplex.training.recipe import Recipe
from loraplex.training.run import train

ECHO = {"name": "echo", "targets": [0], "sources": [2], "probability": 0.5, "second_pass": "full"}


def with_objective(path: Path, output: str, objective: object = None, **training: object) -> Recipe:
    recipe = read_recipe(path)
    changed = {} if objective is None else {"objective": objective}
    return dataclasses.replace(
        recipe, output=str(path.parent / output), adapter=dataclasses.replace(recipe.adapter, **changed),
        training=dataclasses.replace(recipe.training, **training),
    )  # fmt: skip


def test_a_run_ends_as_plain_lora_and_costs_its_passes(tiny_recipe: Path) -> None:
    runs = {
        name: train(with_objective(tiny_recipe, name, objective), count_flops=True)
        for name, objective in (("plain", None), ("echo", ECHO), ("never", {**ECHO, "probability": 0.0}))
    }
    operations = {name: run.metrics["flops_per_token"] for name, run in runs.items()}
    assert operations["never"] == pytest.approx(operations["plain"], rel=1e-3)
    assert operations["echo"] == pytest.approx(1.5 * operations["plain"], rel=0.03)
    saved = json.loads((runs["echo"].adapter / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA"
    files = [load_file(runs[name].adapter / "adapter_model.safetensors") for name in ("plain", "echo")]
    assert {k: v.shape for k, v in files[0].items()} == {k: v.shape for k, v in files[1].items()}
    assert {"echo/loss_off", "echo/routed"} <= runs["echo"].metrics["loss"][0].keys()
    # a second pass that is never drawn is no second pass
    assert [e["loss"] for e in runs["never"].metrics["loss"]] == [e["loss"] for e in runs["plain"].metrics["loss"]]


def test_counting_changes_nothing_and_an_interrupted_run_goes_on(tiny_recipe: Path) -> None:
    whole = train(with_objective(tiny_recipe, "whole", ECHO))
    counted = train(with_objective(tiny_recipe, "counted", ECHO), count_flops=True)
    assert whole.metrics["loss"] == counted.metrics["loss"]
    (counted.folder / "metrics.json").unlink()
    again = train(with_objective(tiny_recipe, "counted", ECHO), resume=True)
    assert again.metrics["loss"] == whole.metrics["loss"]
    first, second = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, again))
    assert all((first[key] == second[key]).all() for key in first)


def test_what_is_budgeted_is_what_is_deployed(tiny_recipe: Path) -> None:
    plain, echo = with_objective(tiny_recipe, "a"), with_objective(tiny_recipe, "b", ECHO)
    counter = Counter(plain)
    assert counter.trainable(plain) == counter.trainable(echo)


def test_a_plan_knows_of_the_passes(tiny_recipe: Path) -> None:
    plain, echo = with_objective(tiny_recipe, "a"), with_objective(tiny_recipe, "b", {**ECHO, "probability": 1.0})
    from loraplex.models.loading import load_tokenizer

    rows = read_rows(plain, load_tokenizer(plain.model.name))
    found = [estimate(recipe, rows) for recipe in (plain, echo)]
    assert found[1].memory.activations > 1.5 * found[0].memory.activations
    assert found[0].trainable < found[1].trainable
    assert resolve(echo).adapter.to_dict()["objective"] == {**ECHO, "probability": 1.0}
