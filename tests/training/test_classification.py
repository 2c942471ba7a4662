"""Runs with a classification head: what is trained, what is saved with it, and what makes no sense is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.conftest import write_pairs_recipe
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loraplex.errors import UserError
from loraplex.models.loading import load_tokenizer
from loraplex.training import preparation
from loraplex.training.estimate import estimate
from loraplex.training.reading import read_recipe
from loraplex.training.recipe import Recipe
from loraplex.training.run import RunResult, train

HEAD = 2 * 32 + 2


@pytest.fixture(scope="module")
def finished(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """One finished run that the tests of this module only look at."""
    return train(read_recipe(write_pairs_recipe(tmp_path_factory.mktemp("classified"), tiny_encoder)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


def trained_losses(recipe: Recipe) -> list[float]:
    tokenizer = load_tokenizer(recipe.model.name)
    rows = preparation.read_rows(recipe, tokenizer)
    model = preparation.add_adapter(recipe, preparation.load_base(recipe))
    trainer = preparation.build_trainer(recipe, model, tokenizer, rows, Path(recipe.output))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def changed(recipe: Recipe, **training: Any) -> Recipe:
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **training))


def test_it_learns_and_the_head_is_counted_apart(finished: RunResult) -> None:
    metrics = finished.metrics
    after, parameters = metrics["accuracy"]["after"], metrics["parameters"]
    assert metrics["loss"][-1]["loss"] < metrics["loss"][0]["loss"] - 0.1
    assert metrics["accuracy"]["before"] is None
    assert after["kind"] == "classes"
    assert after["value"] > 0.7
    assert parameters["head"] == HEAD
    # two blocks of six linear maps and the pooler
    assert parameters["sites"] == 13
    assert parameters["trainable"] == sum(tensor.numel() for tensor in weights(finished.folder).values())
    assert metrics["reload"]["difference"] == 0
    assert metrics["reload"]["difference_peft"] <= 1e-5 * metrics["reload"]["largest_logit"]


def test_the_folder_gives_every_item_its_logits_in_stock_peft(finished: RunResult, tiny_encoder: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=2)
    model, tokenizer = (
        PeftModel.from_pretrained(base, str(finished.adapter)),
        AutoTokenizer.from_pretrained(tiny_encoder),
    )
    model.eval()
    assert model.peft_config["default"].peft_type == "LORA"
    lines = (finished.folder / "evaluation/after.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in (finished.folder.parent / "pairs.jsonl").read_text().splitlines()]
    assert len(lines) == len(rows) == 40
    for line, row in zip(lines, rows, strict=True):
        item = json.loads(line)
        with torch.no_grad():
            expected = model(**tokenizer(row["first"], row["other"], return_tensors="pt")).logits[0].log_softmax(-1)
        assert item["log_probs"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert item["correct"] == (int(expected.argmax()) == row["label"])


def test_the_first_loss_is_the_cross_entropy_of_the_untrained_model(pairs_recipe: Path) -> None:
    recipe = changed(read_recipe(pairs_recipe), batch_size=40, max_steps=1)
    model, tokenizer = preparation.load_base(recipe), load_tokenizer(recipe.model.name)
    rows = [json.loads(line) for line in pairs_recipe.with_name("pairs.jsonl").read_text().splitlines()]
    texts = [row["first"] for row in rows], [row["other"] for row in rows]
    with torch.no_grad():
        logits = model(**tokenizer(*texts, padding=True, return_tensors="pt")).logits
    expected = F.cross_entropy(logits, torch.tensor([row["label"] for row in rows]))
    assert trained_losses(recipe) == pytest.approx([float(expected)], abs=1e-5)


def test_two_passes_of_half_a_batch_train_as_the_whole_batch_does(pairs_recipe: Path, tmp_path: Path) -> None:
    recipe = read_recipe(pairs_recipe)
    whole = trained_losses(recipe)
    halves = changed(
        dataclasses.replace(recipe, output=str(tmp_path / "halves")), batch_size=4, gradient_accumulation=2
    )
    assert trained_losses(halves) == pytest.approx(whole, abs=1e-4)
    assert whole[-1] < whole[0] - 0.1


def test_autocast_trains_without_an_accelerator_too(pairs_recipe: Path, tmp_path: Path) -> None:
    recipe = changed(read_recipe(pairs_recipe), max_steps=3)
    again = changed(dataclasses.replace(recipe, output=str(tmp_path / "again")), autocast=True)
    exact, metrics = trained_losses(recipe), train(again).metrics
    rounded = [entry["loss"] for entry in metrics["loss"]]
    assert rounded == pytest.approx(exact, abs=2e-2)
    assert rounded != exact
    # measured and compared in float32
    assert metrics["reload"]["difference"] == 0


def test_gradient_checkpointing_changes_nothing(pairs_recipe: Path, tmp_path: Path) -> None:
    recipe = changed(read_recipe(pairs_recipe), max_steps=3)
    again = changed(dataclasses.replace(recipe, output=str(tmp_path / "again")), gradient_checkpointing=True)
    assert trained_losses(again) == pytest.approx(trained_losses(recipe), abs=1e-5)


def test_resuming_gives_the_bits_of_an_uninterrupted_run(finished: RunResult, tmp_path: Path) -> None:
    halfway = tmp_path / "halfway"
    shutil.copytree(finished.folder / "checkpoints/checkpoint-4", halfway / "checkpoints/checkpoint-4")
    shutil.copy(finished.folder / "recipe.yaml", halfway)
    recipe = dataclasses.replace(read_recipe(finished.folder / "recipe.yaml"), output=str(halfway))
    assert recipe.model.dtype == "float32"
    resumed = train(recipe, resume=True)
    assert resumed.metrics["speed"]["steps"] == 4
    assert same(weights(resumed.folder), weights(finished.folder))


def test_epochs_count_rows_that_are_not_held_out(pairs_recipe: Path) -> None:
    recipe = read_recipe(pairs_recipe, ["--training.validation_rows", "8", "--evaluation.rows", "validation"])
    result = train(changed(recipe, max_steps=None, epochs=2.0, save_every=None))
    assert result.metrics["steps"] == 8
    assert result.metrics["accuracy"]["after"]["items"] == result.metrics["rows"]["validation"] == 8


def test_an_allocation_drives_itself_and_its_ranks_are_saved(pairs_recipe: Path, tiny_encoder: Path) -> None:
    allocation = {
        "name": "hetero",
        "proxy": "grad_norm",
        "share": 0.3,
        "unit": "parameters",
        "interval": 3,
        "batches": 2,
    }
    recipe = read_recipe(pairs_recipe)
    result = train(dataclasses.replace(recipe, adapter=dataclasses.replace(recipe.adapter, allocation=allocation)))
    decisions = result.metrics["allocation"]
    assert [decision["step"] for decision in decisions] == [0, 3, 6]
    assert all(0 < decision["spent"] <= decision["budget"]["amount"] for decision in decisions)
    sizes = {key: tensor.numel() for key, tensor in weights(result.folder).items() if ".lora_" in key}
    assert sum(sizes.values()) == decisions[-1]["spent"]
    base = AutoModelForSequenceClassification.from_pretrained(tiny_encoder)
    assert PeftModel.from_pretrained(base, str(result.adapter)).peft_config["default"].peft_type == "LORA"


def test_stock_adalora_moves_its_ranks_and_trains_the_head(pairs_recipe: Path, tiny_encoder: Path) -> None:
    section = {"peft_type": "ADALORA", "init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 1, "deltaT": 1}
    result = train(dataclasses.replace(read_recipe(pairs_recipe), adapter=None, peft=section))
    base = AutoModelForSequenceClassification.from_pretrained(tiny_encoder)
    pattern = PeftModel.from_pretrained(base, str(result.adapter)).peft_config["default"].rank_pattern
    # one rank a site on average
    assert sum(sum(kept) for kept in pattern.values()) == 13
    assert result.metrics["parameters"]["head"] == HEAD
    fresh = dict(preparation.load_base(read_recipe(pairs_recipe)).named_parameters())["classifier.weight"]
    assert not torch.equal(weights(result.folder)["base_model.model.classifier.weight"], fresh)


def test_a_routed_adapter_shows_its_routing(pairs_recipe: Path) -> None:
    result = train(read_recipe(pairs_recipe, ["--adapter", "{name: hydra, heads: 2}", "--max-steps", "2"]))
    assert set(result.metrics["routing"]) == {"entropy", "dead"} or result.metrics["routing"]
    assert (result.folder / "routing.json").is_file()


def test_the_estimate_counts_the_head(pairs_recipe: Path) -> None:
    recipe = read_recipe(pairs_recipe)
    found = estimate(recipe, preparation.read_rows(recipe, load_tokenizer(recipe.model.name)))
    model = preparation.add_adapter(recipe, preparation.load_base(recipe))
    assert (found.trainable, found.total) == model.get_nb_trainable_parameters()
    assert (found.kinds[-1].name, found.kinds[-1].parameters) == ("trained besides", HEAD)
    assert found.batches.padded
    assert found.seconds > 0


def test_a_decoder_takes_a_head_too(pairs_recipe: Path, tiny_model: Path) -> None:
    recipe = read_recipe(pairs_recipe, ["--model.name", str(tiny_model), "--data.second", "null", "--max-steps", "3"])
    metrics = train(recipe).metrics
    assert metrics["accuracy"]["after"]["items"] == 40
    assert metrics["parameters"]["head"] == 2 * 32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--objective", "echo"], "computes the loss of tokens, model.head classification has the loss of classes"),
        (["--evaluation.kind", "generation"], "does not allow evaluation.kind generation"),
        (["--loss-on", "all"], "learns classes, not tokens"),
        (["--chat", "true"], "reads texts, not chats"),
        (["--choices", "[cat, cat]"], "names a class twice"),
        (["--head", "language"], "data.second is for model.head classification"),
        (["--head", "language", "--second", "null"], "for an encoder, model.head to classification"),
        (["--choices", "[hill, dog, cat]", "--answer", "other"], "is none of the 3 choices"),
        (["--training.trainer_args.packing", "true"], "packing is not an argument of TrainingArguments"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: list[str], message: str, pairs_recipe: Path) -> None:
    with pytest.raises(UserError) as raised:
        train(read_recipe(pairs_recipe, overrides))
    assert message in str(raised.value)


def test_classes_need_names(tiny_encoder: Path) -> None:
    with pytest.raises(UserError, match=r"name the classes in data\.choices"):
        read_recipe_text(f"model: {{name: {tiny_encoder}, head: classification}}")


def read_recipe_text(text: str) -> Recipe:
    import yaml

    from loraplex.training.reading import recipe_from_mapping

    return recipe_from_mapping({"output": "run", **yaml.safe_load(text)})
