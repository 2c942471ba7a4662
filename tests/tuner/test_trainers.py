"""Trainers as they are: transformers.Trainer, TRL's for SFT, DPO, KTO and GRPO, with nothing of loraplex in between."""

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.tuner.tiny_models import KINDS, VOCABULARY, adapted, bert, build, config, frozen_copy, llama, logits, same
from tests.tuner.trainer_arguments import arguments
from tests.tuner.trl_trainers import letters, other_loss
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import loraplex
from loraplex.tuner.layer import SiteLayer

EVERY = pytest.mark.parametrize("adapter", KINDS)


@pytest.fixture(scope="module")
def tokenizer():
    return letters()


def rows(count=48, length=10):
    """Sequences that count up: something to learn."""
    starts = torch.randint(2, 30, (count,), generator=torch.Generator().manual_seed(0))
    ids = [[int(start) + step for step in range(length)] for start in starts]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


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
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})
    model = get_peft_model(bert(), config("bert", adapter="dora"))
    run = Trainer(model=model, args=TrainingArguments(**arguments(tmp_path, max_steps=8)), train_dataset=data)
    run.train()
    run.save_model(tmp_path / "saved")
    stock = PeftModel.from_pretrained(bert(), tmp_path / "saved")
    torch.testing.assert_close(logits(stock.eval()), logits(model.eval()), rtol=0, atol=2e-6)
    assert any("classifier" in key for key in load_file(tmp_path / "saved" / "adapter_model.safetensors"))


TEXTS = [{"prompt": f"what is {a} and {b}? ", "completion": f"it is {a + b}."} for a in range(4) for b in range(5)]
PAIRS = [{**row, "chosen": row["completion"], "rejected": "no."} for row in TEXTS]


def sft(folder, tokenizer, adapter, model=None, **overrides):
    return SFTTrainer(
        model=llama() if model is None else model,
        args=SFTConfig(**arguments(folder, max_steps=6, bf16=False, **{"max_length": 64, **overrides})),
        train_dataset=Dataset.from_list(TEXTS),
        processing_class=tokenizer,
        peft_config=config(adapter=adapter) if model is None else None,
    )


@EVERY
def test_sft_trainer_makes_the_adapter_from_its_config(adapter, tokenizer, tmp_path):
    run = sft(tmp_path, tokenizer, adapter)
    assert any(isinstance(module, SiteLayer) for module in run.model.modules())
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    run.save_model(tmp_path / "saved")
    stock = PeftModel.from_pretrained(llama(), tmp_path / "saved")
    assert type(stock.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(logits(stock), logits(run.model.eval()), rtol=0, atol=2e-6)


@EVERY
def test_sft_trainer_learns_what_stock_peft_learns(adapter, tokenizer, tmp_path):
    """From the same start, in the same order: losses and token accuracies agree step by step."""
    from loraplex.tuner.peft_lora import to_lora_config

    start = adapted(adapter=adapter, target_modules=["q_proj", "v_proj", "down_proj"])
    start.save_pretrained(tmp_path / "start")
    stock = PeftModel.from_pretrained(llama(), tmp_path / "start", is_trainable=True)
    assert to_lora_config(start.peft_config["default"]).use_dora == (adapter == "dora")
    history = []
    for model in (stock, loraplex.load_adapter(llama(), str(tmp_path / "start"), is_trainable=True)):
        run = sft(tmp_path, tokenizer, adapter, model, learning_rate=2e-3)
        run.train()
        history.append([e for e in run.state.log_history if "loss" in e])
    for theirs, ours in zip(*history, strict=True):
        for key in ("loss", "mean_token_accuracy", "entropy", "grad_norm", "num_tokens"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3), key


@EVERY
def test_sft_trainer_accumulates_and_resumes(adapter, tokenizer, tmp_path):
    one = sft(tmp_path / "one", tokenizer, adapter, save_strategy="steps", save_steps=3)
    one.train()
    four = sft(tmp_path, tokenizer, adapter, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    four.train()
    assert losses(four) == pytest.approx(losses(one), rel=2e-3)
    again = sft(tmp_path / "again", tokenizer, adapter)
    again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))
    assert losses(again)[-3:] == losses(one)[-3:]
    assert same(again.model.state_dict(), one.model.state_dict())


@EVERY
@pytest.mark.parametrize("given", ["config", "model"])
def test_dpo_trainer(adapter, given, tokenizer, tmp_path):
    """With a config the reference is the model with the adapter off; with a model TRL copies the adapter as 'ref'."""
    model = llama()
    expected_reference = logits(model)
    if given == "model":
        model = get_peft_model(model, config(adapter=adapter))
        model.base_model.close_ranks("default", "model.layers.0.mlp.up_proj", [1, 2])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        expected_reference = logits(model.eval())
        model.train()
    run = DPOTrainer(
        model=model,
        args=DPOConfig(**arguments(tmp_path, max_steps=6, bf16=False, max_length=64, beta=0.5)),
        train_dataset=Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in PAIRS]),
        processing_class=tokenizer,
        peft_config=config(adapter=adapter) if given == "config" else None,
    )
    run.train()
    history = [entry for entry in run.state.log_history if "loss" in entry]
    # before the first step policy and reference are the same: the loss is log 2
    assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["rewards/margins"] > 0
    trained = run.model.eval()
    assert not torch.equal(logits(trained), expected_reference)
    if given == "config":
        with trained.disable_adapter():
            assert torch.equal(logits(trained), expected_reference)
    else:
        assert set(trained.peft_config) == {"default", "ref"}
        trained.set_adapter("ref")
        assert torch.equal(logits(trained), expected_reference)


@EVERY
@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO"])
def test_other_losses_of_trl_go_as_with_stock_peft(adapter, name, tmp_path):
    """The same start away from the initial point; GRPO generates in between, by the model's own probabilities."""
    fresh(adapter, init_lora_weights=False).save_pretrained(tmp_path / "start")
    kinds, found = [], []
    for load in (PeftModel.from_pretrained, loraplex.load_adapter):
        model = load(build("llama"), tmp_path / "start", is_trainable=True)
        run = other_loss(name, model, tmp_path / "run")
        run.train()
        kinds.append(type(model.base_model).__name__)
        found.append([[entry["loss"], entry["grad_norm"]] for entry in run.state.log_history if "loss" in entry])
    assert kinds == ["LoraModel", "LoraplexTuner"]
    stock, ours = map(torch.tensor, found)
    assert (stock[:, 1] > 0).sum() >= 3  # a group of equal rewards teaches GRPO nothing
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-5)
