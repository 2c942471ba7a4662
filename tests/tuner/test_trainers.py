"""transformers.Trainer as it is, with nothing of loraplex in between."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.tuner.tiny_models import KINDS, VOCABULARY, bert, build, config, frozen_copy, logits, same
from tests.tuner.trainer_arguments import arguments
from transformers import Trainer, TrainingArguments

import loraplex

EVERY = pytest.mark.parametrize("adapter", KINDS)


def rows(count=48, length=10):
    """Sequences that count up: something to learn."""
    starts = torch.randint(2, 30, (count,), generator=torch.Generator().manual_seed(0))
    ids = [[int(start) + step for step in range(length)] for start in starts]
    return [{"input_ids": row, "labels": row} for row in ids]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer(model, folder, **overrides):
    return Trainer(model=model, args=TrainingArguments(**arguments(folder, **overrides)), train_dataset=rows())


def fresh(adapter, **fields):
    return get_peft_model(build("llama"), config(adapter=adapter, **fields))


@EVERY
def test_trainer_learns_and_saves_plain_lora(adapter, tmp_path):
    model = fresh(adapter)
    frozen = {key: value for key, value in frozen_copy(model).items() if "loraplex_adapters" not in key}
    run = trainer(model, tmp_path, max_steps=10)
    run.train()
    found = losses(run)
    assert found[-1] < found[0] - 0.1
    assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
    run.save_model(tmp_path / "saved")
    stock = PeftModel.from_pretrained(build("llama"), tmp_path / "saved")
    assert type(stock.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(logits(stock), logits(model.eval()), rtol=0, atol=2e-6)


@EVERY
@pytest.mark.parametrize("gates", [False, True], ids=["open", "closed"])
def test_resumed_training_equals_uninterrupted_bit_for_bit(adapter, gates, tmp_path):
    """Dropout on, so that the random states count too; with closed ranks the checkpoint is of our own type."""

    def start(folder, **overrides):
        model = fresh(adapter, lora_dropout=0.2)
        if gates:
            model.base_model.close_ranks("default", "model.layers.0.mlp.up_proj", [0, 2])
        return trainer(model, folder, save_strategy="steps", save_steps=3, **overrides)

    whole = start(tmp_path / "whole")
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-3"
    kind = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    assert kind == ("LORAPLEX" if gates else "LORA")

    # the resumed model starts elsewhere and without closed ranks: everything comes from the checkpoint
    other = trainer(fresh(adapter, lora_dropout=0.2, seed=99), tmp_path / "resumed")
    other.train(resume_from_checkpoint=str(folder))
    assert losses(other)[-3:] == losses(whole)[-3:]
    assert same(other.model.state_dict(), whole.model.state_dict())


@EVERY
def test_best_model_is_restored_at_the_end(adapter, tmp_path):
    """The learning rate explodes after the first evaluation, so the best checkpoint is the first."""
    model = fresh(adapter)
    options = TrainingArguments(
        **arguments(
            tmp_path, max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=True, metric_for_best_model="eval_loss", lr_scheduler_type="constant",
        )
    )  # fmt: skip
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 300.0)
    run = Trainer(
        model=model, args=options, train_dataset=rows(), eval_dataset=rows(8), optimizers=(optimizer, schedule)
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    evaluations = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert evaluations[0] < evaluations[-1]
    assert run.evaluate()["eval_loss"] == run.state.best_metric == evaluations[0]
    best = loraplex.load_adapter(build("llama"), run.state.best_model_checkpoint)
    assert torch.equal(logits(best), logits(model.eval()))


@EVERY
def test_four_small_batches_equal_one_large(adapter, tmp_path):
    found = {}
    for size, accumulation in ((4, 1), (1, 4)):
        run = trainer(
            fresh(adapter), tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
        )
        run.train()
        found[size] = losses(run)
    assert found[1] == pytest.approx(found[4], rel=2e-3)


@EVERY
def test_trainer_with_checkpointing_and_bfloat16(adapter, tmp_path):
    plain = trainer(fresh(adapter), tmp_path)
    plain.train()
    checkpointed = trainer(fresh(adapter), tmp_path, gradient_checkpointing=True)
    checkpointed.train()
    assert losses(checkpointed) == losses(plain)
    half = trainer(fresh(adapter), tmp_path, bf16=True)
    half.train()
    assert losses(half) == pytest.approx(losses(plain), rel=5e-2)
    assert {p.dtype for p in half.model.parameters() if p.requires_grad} == {torch.float32}


def test_classifier_trains_with_its_head(tmp_path):
    ids = torch.randint(2, VOCABULARY, (24, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row.tolist(), "labels": int(row[0]) % 3} for row in ids]
    model = get_peft_model(bert(), config("bert", adapter="dora"))
    run = Trainer(model=model, args=TrainingArguments(**arguments(tmp_path, max_steps=8)), train_dataset=data)
    run.train()
    run.save_model(tmp_path / "saved")
    stock = PeftModel.from_pretrained(bert(), tmp_path / "saved")
    torch.testing.assert_close(logits(stock.eval()), logits(model.eval()), rtol=0, atol=2e-6)
    assert any("classifier" in key for key in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
