"""Stock PEFT adapters through our loop: they train, their ranks are moved, and LoRA's losses are those of our LoRA."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from loraplex.errors import UserError
from loraplex.models.loading import load_model, load_tokenizer
from loraplex.training import preparation
from loraplex.training.reading import read_recipe
from loraplex.training.recipe import Recipe
from loraplex.training.report import split_history
from loraplex.training.run import train
from loraplex.training.stock import stock_config


def with_peft(path: Path, **section: object) -> Recipe:
    recipe = read_recipe(path)
    return dataclasses.replace(recipe, adapter=None, peft=section)


@pytest.mark.parametrize("kind", ["LORA", "VERA", "MISS", "IA3"])
def test_a_stock_adapter_is_trained_saved_and_measured(tiny_recipe: Path, tiny_model: Path, kind: str) -> None:
    own = {"IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}}
    shape = {"LORA": {"r": 2}, "VERA": {"r": 2, "target_modules": ["q_proj", "o_proj"]}, "MISS": {"r": 2}} | own
    result = train(with_peft(tiny_recipe, peft_type=kind, **shape[kind]))
    assert result.metrics["loss"][-1]["loss"] < result.metrics["loss"][0]["loss"]
    assert result.metrics["reload"]["difference"] is None
    assert not (result.folder / "plan.json").exists()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(result.adapter))
    assert str(model.peft_config["default"].peft_type.value) == kind


def test_adalora_moves_its_ranks(tiny_recipe: Path) -> None:
    section = {"peft_type": "ADALORA", "init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 1, "deltaT": 1}
    result = train(with_peft(tiny_recipe, **section))
    config = PeftModel.from_pretrained(load_model(read_recipe(tiny_recipe).model.name, "float32"), str(result.adapter))
    pattern = config.peft_config["default"].rank_pattern
    # Budget: one rank a site on average, of the four that each started with.
    assert sum(sum(kept) for kept in pattern.values()) == 14
    assert all(len(kept) == 4 for kept in pattern.values())
    sizes = {"q_proj": 64, "k_proj": 48, "v_proj": 48, "o_proj": 64, "gate_proj": 80, "up_proj": 80, "down_proj": 80}
    # of a rank a row of A, a column of B and its singular value
    left = sum(sum(kept) * (sizes[name.split(".")[-2]] + 1) for name, kept in pattern.items())
    assert result.metrics["parameters"]["deployed"] == left
    assert result.metrics["parameters"]["trainable"] == 4 * 2 * (sum(sizes.values()) + 7)


def test_adalora_ends_with_its_budget_also_where_no_step_is_left_after_it(tiny_recipe: Path) -> None:
    """PEFT's own defaults, but for revisions that the last step is none of: the end still fixes the final ranks."""
    result = train(with_peft(tiny_recipe, peft_type="ADALORA", init_r=4, target_r=2, deltaT=4))
    model = PeftModel.from_pretrained(load_model(read_recipe(tiny_recipe).model.name, "float32"), str(result.adapter))
    assert sum(sum(kept) for kept in model.peft_config["default"].rank_pattern.values()) == 2 * 14


def losses(recipe: Recipe, model: PeftModel, folder: Path) -> list[float]:
    tokenizer = load_tokenizer(recipe.model.name)
    rows = preparation.read_rows(recipe, tokenizer)
    trainer = preparation.build_trainer(recipe, model, tokenizer, rows, folder)
    trainer.train()
    return [entry["loss"] for entry in split_history(trainer.state.log_history)[0]]


@pytest.mark.slow
def test_from_equal_weights_our_lora_and_peft_s_have_one_loss_curve(tmp_path: Path) -> None:
    """Fp32, 20 steps on SmolLM2: ours without padding and fused, PEFT's padded and projected at every position."""
    words = ["rain", "falls", "on", "the", "hill", "where", "the", "old", "dog", "and", "the", "cat", "sleep"]
    rows = [{"prompt": " ".join(words[: 2 + i % 9]), "completion": f" {words[i % 7]}"} for i in range(60)]
    path, data = tmp_path / "recipe.yaml", tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.write_text(
        f"output: {tmp_path / 'run'}\n"
        "model: {name: embedded, dtype: float32}\n"
        "adapter: {r: 4, lora_alpha: 16}\n"
        f"data: {{train: {data}}}\n"
        "training: {max_steps: 20, batch_size: 3, learning_rate: 1e-3, warmup: 2}\n"
    )
    recipe = read_recipe(path)
    ours = preparation.add_adapter(recipe, load_model("embedded", "float32"))
    config = stock_config({"peft_type": "LORA", "r": 4, "lora_alpha": 16})
    stock = get_peft_model(load_model("embedded", "float32"), config)
    assert isinstance(stock, PeftModel)
    initial = {name: tensor for name, tensor in ours.named_parameters() if tensor.requires_grad}
    with torch.no_grad():
        targets = [(name, tensor) for name, tensor in stock.named_parameters() if tensor.requires_grad]
        for name, tensor in targets:
            path_of_site, _, letter = name.removesuffix(".default.weight").rpartition(".")
            (source,) = (t for n, t in initial.items() if n.startswith(path_of_site + ".") and letter in n)
            tensor.copy_(source)
    assert len(targets) == len(initial)
    mine, theirs = losses(recipe, ours, tmp_path / "ours"), losses(recipe, stock, tmp_path / "stock")
    assert len(mine) == 20
    assert mine[-1] < mine[0] - 0.5
    assert mine == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"peft_type": "LORRA"}, "is not an adapter of PEFT. Did you mean 'LORA'?"),
        ({}, "There are ADALORA"),
        ({"peft_type": "LORA", "rank": 3}, "peft.rank is not a field of LoraConfig"),
        ({"peft_type": "ADALORA"}, "set training.max_steps or peft.total_step"),
        ({"peft_type": "VERA", "r": 2, "target_modules": "all-linear", "layers_pattern": "h"}, "peft: "),
    ],
)
def test_what_is_wrong_is_said(section: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as raised:
        stock_config(section)
    assert message in str(raised.value)


def test_two_adapters_are_refused(tiny_recipe: Path) -> None:
    with pytest.raises(UserError, match="both an adapter and a peft section"):
        read_recipe(tiny_recipe, ["--peft", "{peft_type: LORA}"])
