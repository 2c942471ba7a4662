"""TRL's trainers as they are, for SFT, DPO, KTO and GRPO, with nothing of loraplex in between."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.extras import NEEDS_TRL
from tests.tuner.letters import letters
from tests.tuner.tiny_models import KINDS, adapted, config, llama, logits, same
from tests.tuner.trainer_arguments import arguments

import loraplex
from loraplex.tuner.layer import SiteLayer

trl = pytest.importorskip("trl", reason=NEEDS_TRL)
datasets = pytest.importorskip("datasets", reason=NEEDS_TRL)

EVERY = pytest.mark.parametrize("adapter", KINDS)


@pytest.fixture(scope="module")
def tokenizer():
    return letters()


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


TEXTS = [{"prompt": f"what is {a} and {b}? ", "completion": f"it is {a + b}."} for a in range(4) for b in range(5)]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no."} for row in TEXTS]


def sft(folder, tokenizer, adapter, model=None, **overrides):
    return trl.SFTTrainer(
        model=llama() if model is None else model,
        args=trl.SFTConfig(**arguments(folder, max_steps=6, bf16=False, **{"max_length": 64, **overrides})),
        train_dataset=datasets.Dataset.from_list(TEXTS),
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
    run = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**arguments(tmp_path, max_steps=6, bf16=False, max_length=64, beta=0.5)),
        train_dataset=datasets.Dataset.from_list(PAIRS),
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
    get_peft_model(llama(), config(adapter=adapter, init_lora_weights=False)).save_pretrained(tmp_path / "start")
    from tests.tuner.trl_trainers import other_loss

    kinds, found = [], []
    for load in (PeftModel.from_pretrained, loraplex.load_adapter):
        model = load(llama(), tmp_path / "start", is_trainable=True)
        run = other_loss(name, model, tmp_path / "run")
        run.train()
        kinds.append(type(model.base_model).__name__)
        found.append([[entry["loss"], entry["grad_norm"]] for entry in run.state.log_history if "loss" in entry])
    assert kinds == ["LoraModel", "LoraplexTuner"]
    stock, ours = map(torch.tensor, found)
    assert (stock[:, 1] > 0).sum() >= 3  # a group of equal rewards teaches GRPO nothing
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-5)
