"""The estimate: what is exact equals the real model, what is an estimate follows what it is made of."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from loraplex import AdapterConfig
from loraplex.models.loading import load_tokenizer
from loraplex.training.estimate import Estimate, estimate, plan_batches
from loraplex.training.preparation import add_adapter, build_trainer, read_rows
from loraplex.training.probe import measure_block
from loraplex.training.reading import read_recipe
from loraplex.training.recipe import Recipe


def estimated(recipe: Recipe) -> Estimate:
    return estimate(recipe, read_rows(recipe, load_tokenizer(recipe.model.name)))


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_parameters_and_ranks_are_those_of_the_real_model(adapter: str, tiny_recipe: Path, tiny_model: Path) -> None:
    recipe = read_recipe(tiny_recipe, ["--adapter", adapter, "--adapter.rank_pattern.v_proj", "3"])
    found = estimated(recipe)
    model = add_adapter(recipe, AutoModelForCausalLM.from_pretrained(tiny_model))
    assert (found.trainable, found.total) == model.get_nb_trainable_parameters()
    assert sum(kind.parameters for kind in found.kinds) == found.trainable
    assert {kind.name: kind.ranks for kind in found.kinds}["v_proj"] == (3, 3)
    assert found.ranks.keys() == {layer.site for layer in model.base_model.site_layers()}


def test_modules_trained_in_full_are_counted(tiny_recipe: Path) -> None:
    recipe = read_recipe(tiny_recipe, ["--modules-to-save", "[norm]"])
    # five norms of 32
    assert estimated(recipe).kinds[-1].parameters == 160


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("padding_free", [False, "auto"])
def test_what_two_blocks_keep_tells_what_more_blocks_keep(
    adapter: str, padding_free: bool | str, tiny_recipe: Path, tiny_model: Path
) -> None:
    config = AutoConfig.from_pretrained(tiny_model, num_hidden_layers=5)
    section = {"adapter": adapter, "target_modules": ["q_proj", "down_proj"], "padding_free": padding_free}
    recipe = dataclasses.replace(read_recipe(tiny_recipe), adapter=AdapterConfig(**section))
    block = measure_block(recipe, config, torch.float32, ["q_proj", "down_proj"], [17, 14, 9])
    base = AutoModelForCausalLM.from_config(config)
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    model = add_adapter(recipe, base).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    mask = (torch.arange(17)[None] < torch.tensor([17, 14, 9])[:, None]).long()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=mask, attention_mask=mask, labels=(mask - 1) * 100, fused_lm_head=True).loss
    assert loss.requires_grad
    assert 5 * block.kept + block.kept_outside == pytest.approx(sum(kept.values()), rel=0.05)


def test_memory_grows_with_what_it_is_made_of(tiny_recipe: Path) -> None:
    plain = estimated(read_recipe(tiny_recipe)).memory
    assert plain.gradients == plain.adapter
    assert plain.optimizer == 2 * plain.adapter
    assert estimated(read_recipe(tiny_recipe, ["--optimizer", "sgd"])).memory.optimizer == 0
    assert estimated(read_recipe(tiny_recipe, ["--model.dtype", "bfloat16"])).memory.weights == pytest.approx(
        plain.weights / 2, rel=0.01
    )
    assert estimated(read_recipe(tiny_recipe, ["--r", "4"])).memory.adapter == 2 * plain.adapter
    checkpointed = estimated(read_recipe(tiny_recipe, ["--gradient-checkpointing", "true"])).memory
    assert checkpointed.activations < plain.activations


def test_steps_and_tokens_follow_the_recipe(tiny_recipe: Path) -> None:
    recipe = read_recipe(tiny_recipe, ["--training.batch-size", "4", "--gradient-accumulation", "2"])
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, max_steps=None, epochs=3.0))
    batches = plan_batches(recipe, [10, 20, 30] * 7, padded=True)
    # 21 rows: 6 passes an epoch, 3 steps
    assert batches.steps == 9
    assert batches.most_tokens == 4 * 30
    free = plan_batches(recipe, [10, 20, 30] * 7, padded=False)
    # 18 passes share three epochs of 420 tokens
    assert free.mean_tokens == 3 * 420 / 18
    assert free.most_tokens <= 120


def test_the_largest_batch_is_the_trainer_s_own(tiny_recipe: Path, tiny_model: Path) -> None:
    recipe = read_recipe(tiny_recipe, ["--seed", "3"])
    tokenizer = load_tokenizer(recipe.model.name)
    rows = read_rows(recipe, tokenizer)
    # Rows of lengths that no two batches share.
    for index, row in enumerate(rows.train.rows):
        row["input_ids"] = row["input_ids"] + [2] * (index * index)
        row["completion_mask"] = row["completion_mask"] + [1] * (index * index)
    model = add_adapter(recipe, AutoModelForCausalLM.from_pretrained(tiny_model))
    trainer = build_trainer(recipe, model, tokenizer, rows, tiny_recipe.parent / "checkpoints")
    sums = [int(batch["attention_mask"].sum()) for batch in trainer.get_train_dataloader()]
    found = plan_batches(recipe, [len(row["input_ids"]) for row in rows.train.rows], padded=False)
    assert (found.most_tokens, found.mean_tokens) == (max(sums), sum(sums) / len(sums))


def test_padding_counts_where_it_goes_through_the_model(tiny_recipe: Path) -> None:
    assert not estimated(read_recipe(tiny_recipe)).batches.padded
    assert estimated(read_recipe(tiny_recipe, ["--adapter.padding_free", "false"])).batches.padded
