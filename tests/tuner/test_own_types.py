"""Adapters of our own type under the trainers: resumed, restored, checkpointed, sharded, and written out at the end."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.extras import TRL
from tests.tuner.tiny_models import adapted, build, config, gradients, logits, same
from tests.two_processes import run_two
from transformers import Trainer, TrainingArguments

import loraplex
from loraplex.adapters.registry import SaveFormat, parse_adapter
from loraplex.methods import REGISTRY
from loraplex.tuner.peft_format import save_peft_format

OWN = [name for name in REGISTRY.presets if parse_adapter(name).save_format is SaveFormat.OWN]
EVERY = pytest.mark.parametrize("adapter", [*OWN, {"name": "lora", "init": "pissa"}], ids=str)


def rows(count=24, length=10):
    starts = torch.randint(2, 30, (count,), generator=torch.Generator().manual_seed(0))
    ids = [[int(start) + step for step in range(length)] for start in starts]
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model, folder, **overrides):
    options = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 3, "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "seed": 7,
    }  # fmt: skip
    return Trainer(
        model=model, args=TrainingArguments(**{**options, **overrides}), train_dataset=rows(), eval_dataset=rows(8)
    )


def fresh(adapter, **fields):
    return get_peft_model(build("llama"), config(adapter=adapter, lora_dropout=0.2, **fields))


@EVERY
def test_resumed_training_equals_uninterrupted_bit_for_bit(adapter, tmp_path):
    whole = trainer(fresh(adapter), tmp_path / "whole")
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-3"
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORAPLEX"
    # another seed: everything comes from the checkpoint
    other = trainer(fresh(adapter, seed=99), tmp_path / "resumed", save_strategy="no")
    other.train(resume_from_checkpoint=str(folder))
    assert same(other.model.state_dict(), whole.model.state_dict())


@EVERY
def test_best_model_is_restored_and_written_out(adapter, tmp_path):
    run = trainer(
        fresh(adapter), tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    run.train()
    # the worst counts as the best, which is the first as long as anything is learned
    assert run.state.best_model_checkpoint.endswith("checkpoint-3")
    assert run.evaluate()["eval_loss"] == run.state.best_metric
    model = run.model.eval()
    best = loraplex.load_adapter(build("llama"), run.state.best_model_checkpoint)
    assert torch.equal(logits(best), logits(model))
    if parse_adapter(adapter).peft_format is SaveFormat.OWN:
        return
    save_peft_format(model, tmp_path / "plain")
    stock = PeftModel.from_pretrained(build("llama"), tmp_path / "plain")
    assert type(stock.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=2e-6)


@TRL
@EVERY
def test_sft_trainer_makes_the_adapter_from_its_config(adapter, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    options = SFTConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    run = SFTTrainer(
        model=build("llama"), args=options, train_dataset=Dataset.from_list(rows()),
        peft_config=config(adapter=adapter),
        processing_class=_tokenizer(),
    )  # fmt: skip
    run.train()
    found = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert found[-1] < found[0]


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(60)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), pad_token="w0", eos_token="w1"
    )


@EVERY
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(adapter, reentrant):
    model = adapted(adapter=adapter).train()
    plain = gradients(model, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = gradients(model, use_cache=False)
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        # a tied tensor adds its sites up in another order
        torch.testing.assert_close(again[key], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_sharded_by_fsdp2_as_on_one_process(warm_python):
    """Two processes, every block and the root sharded: the shared tensors are in the root's group."""
    said = run_two(warm_python, Path(__file__).with_name("fsdp2_worker.py"), *OWN)
    assert all(f"{name} equal" in said for name in OWN)
