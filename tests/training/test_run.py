"""A run on a tiny model: what it leaves, and that stopping, failing and going on lose nothing."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.conftest import write_tiny_recipe
from transformers import AutoModelForCausalLM

from loraplex.errors import UserError
from loraplex.training.folder import RunFolder, is_whole
from loraplex.training.reading import read_recipe
from loraplex.training.recipe import Recipe
from loraplex.training.run import RunResult, train
from loraplex.training.trainer import DivergedError


def with_output(recipe: Recipe, output: Path, **training: Any) -> Recipe:
    options = dataclasses.replace(recipe.training, **training)
    return dataclasses.replace(recipe, output=str(output), training=options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """One finished run that the tests of this module only look at."""
    folder = tmp_path_factory.mktemp("finished")
    return train(read_recipe(write_tiny_recipe(folder, tiny_model)))


def test_the_run_folder_is_complete(finished: RunResult) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {
        "adapter",
        "checkpoints",
        "environment.json",
        "evaluation",
        "loss.png",
        "metrics.json",
        "plan.json",
        "recipe.yaml",
    }
    assert (finished.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((finished.folder / "evaluation/after.jsonl").read_text().splitlines()) == 24
    assert json.loads((finished.folder / "metrics.json").read_text()) == finished.metrics


def test_the_metrics_say_what_happened(finished: RunResult) -> None:
    metrics = finished.metrics
    assert [entry["step"] for entry in metrics["loss"]] == [1, 2, 3, 4, 5, 6]
    assert metrics["loss"][-1]["loss"] < metrics["loss"][0]["loss"]
    assert metrics["accuracy"]["before"]["items"] == metrics["accuracy"]["after"]["items"] == 24
    assert metrics["parameters"]["sites"] == 14
    assert metrics["parameters"]["trainable"] == sum(tensor.numel() for tensor in weights(finished.folder).values())
    assert metrics["rows"] | {"train": 24, "truncated": 0, "dropped": 0} == metrics["rows"]
    assert metrics["reload"]["difference"] == 0
    assert metrics["reload"]["difference_peft"] <= 1e-5 * metrics["reload"]["largest_logit"]


def test_the_tokens_counted_are_those_of_the_rows(finished: RunResult) -> None:
    # six steps of four rows are all 24 rows once
    assert finished.metrics["speed"]["tokens"] == finished.metrics["rows"]["train_tokens"]


def test_the_adapter_loads_in_stock_peft(finished: RunResult, tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, str(finished.adapter))
    assert model.peft_config["default"].peft_type == "LORA"
    ids = torch.arange(2, 12)[None]
    with torch.no_grad(), model.disable_adapter():
        plain = model(ids).logits
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, plain, atol=1e-3)


def test_the_resolved_recipe_trains_the_same(finished: RunResult, tmp_path: Path) -> None:
    resolved = read_recipe(finished.folder / "recipe.yaml")
    again = train(with_output(resolved, tmp_path / "again"))
    assert same(weights(again.folder), weights(finished.folder))


def test_another_seed_trains_another_adapter(finished: RunResult, tmp_path: Path) -> None:
    recipe = read_recipe(finished.folder / "recipe.yaml", ["--seed", "1", "--output", str(tmp_path / "other")])
    assert not same(weights(train(recipe).folder), weights(finished.folder))


def test_resuming_gives_the_bits_of_an_uninterrupted_run(finished: RunResult, tmp_path: Path) -> None:
    halfway = tmp_path / "halfway"
    recipe = read_recipe(finished.folder / "recipe.yaml")
    shutil.copytree(finished.folder / "checkpoints/checkpoint-3", halfway / "checkpoints/checkpoint-3")
    shutil.copy(finished.folder / "recipe.yaml", halfway)
    resumed = train(with_output(recipe, halfway), resume=True)
    assert resumed.metrics["speed"]["steps"] == 3
    assert resumed.metrics["loss"] == finished.metrics["loss"]
    assert same(weights(resumed.folder), weights(finished.folder))


def test_a_run_that_ended_before_its_reports_is_completed(finished: RunResult, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.folder, copy)
    (copy / "metrics.json").unlink()
    recipe = with_output(read_recipe(finished.folder / "recipe.yaml"), copy)
    resumed = train(recipe, resume=True)
    assert resumed.metrics["steps"] == 6
    assert same(weights(copy), weights(finished.folder))


def test_a_checkpoint_that_is_not_whole_is_not_resumed_from(finished: RunResult, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "copy")
    shutil.copytree(finished.folder, folder.path)
    last = folder.last_checkpoint()
    assert last is not None
    assert last.name == "checkpoint-6"
    (last / "optimizer.pt").write_bytes((last / "optimizer.pt").read_bytes()[:-1])
    assert not is_whole(last)
    assert folder.last_checkpoint() == folder.checkpoints / "checkpoint-3"
    (folder.checkpoints / "checkpoint-3/loraplex_files.json").unlink()
    assert folder.last_checkpoint() is None


def test_resuming_with_another_recipe_is_refused(finished: RunResult, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.folder, copy)
    (copy / "metrics.json").unlink()
    recipe = with_output(read_recipe(finished.folder / "recipe.yaml"), copy, learning_rate=0.5)
    with pytest.raises(UserError, match=r"training\.learning_rate was 0\.01 and is 0\.5 now"):
        train(recipe, resume=True)


def test_a_finished_run_is_not_resumed(finished: RunResult) -> None:
    with pytest.raises(UserError, match="is finished: --overwrite trains it again"):
        train(read_recipe(finished.folder / "recipe.yaml"), resume=True)


def test_overwriting_keeps_what_is_not_ours(finished: RunResult, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.folder, copy)
    (copy / "notes.txt").write_text("mine")
    recipe = with_output(read_recipe(finished.folder / "recipe.yaml"), copy, max_steps=1)
    assert train(recipe, overwrite=True).metrics["steps"] == 1
    assert (copy / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["checkpoint-1"]


def test_the_best_checkpoint_is_what_is_saved(tiny_recipe: Path) -> None:
    recipe = read_recipe(tiny_recipe, ["--validation-rows", "8", "--eval-every", "1", "--save-every", "1"])
    # A rate at which the model gets worse after the first steps.
    recipe = with_output(recipe, Path(recipe.output), load_best=True, learning_rate=100.0, keep_checkpoints=6)
    metrics = train(recipe).metrics
    validation = {entry["step"]: entry["loss"] for entry in metrics["validation"]}
    best = min(validation, key=lambda step: validation[step])
    assert best < 6
    assert metrics["best_checkpoint"] == f"checkpoint-{best}"
    kept = load_file(Path(recipe.output) / f"checkpoints/checkpoint-{best}/adapter_model.safetensors")
    assert same(weights(Path(recipe.output)), kept)


def test_weights_that_overflow_stop_the_run_and_keep_the_good_checkpoint(tiny_recipe: Path) -> None:
    # The first step of a warm-up has the rate 0, so the second is the one that overflows.
    overrides = ["--learning-rate", "1e30", "--warmup", "1", "--save-every", "1"]
    recipe = read_recipe(tiny_recipe, overrides)
    with pytest.raises(DivergedError, match=r"at step [23]|after step 2") as caught:
        train(recipe)
    kept = RunFolder(recipe.output).last_checkpoint()
    assert kept is not None
    assert f"the last good checkpoint is '{kept}'" in str(caught.value)
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(kept / "adapter_model.safetensors").values())
    assert not (Path(recipe.output) / "adapter").exists()


def test_a_base_with_nan_stops_at_the_first_step(tiny_recipe: Path, tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(broken)
    recipe = read_recipe(tiny_recipe, ["--model", str(broken), "--evaluation.kind", "none"])
    with pytest.raises(DivergedError, match=r"the loss is nan at step 1; no checkpoint was due before"):
        train(recipe)
