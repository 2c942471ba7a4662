"""Allocations drive themselves under trainers that know nothing of them, and a loop of one's own in one call."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.allocation.moving import DYNAMIC, MOVING, PROPORTIONAL, ROWS, adapted, arguments, state, step, train
from tests.allocation.scenes import batches
from tests.extras import TRL
from tests.tuner.letters import letters
from tests.tuner.tiny_models import llama
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from loraplex import AdapterConfig, ALoRA, HeteroLoRA, start_allocation
from loraplex.training_hooks.allocation_in_trainer import decisions
from loraplex.training_hooks.registry import LoraplexCallback

EVERY = pytest.mark.parametrize(
    "allocation",
    [HeteroLoRA(batches=2), DYNAMIC, PROPORTIONAL, MOVING],
    ids=["static", "dynamic", "proportional", "alora"],
)


@EVERY
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_what_comes_out_is_plain_lora_that_computes_the_same(allocation: Any, adapter: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = adapted(allocation, adapter=adapter)
    trainer = train(model, tmp_path)
    found = decisions(trainer.state.log_history)
    assert [entry["step"] for entry in found] == {"static": [0], "moving": [2, 4]}.get(
        "moving" if allocation is MOVING else "static" if allocation == HeteroLoRA(batches=2) else "", [0, 2, 4]
    )
    for entry in found:
        assert entry["spent"] + entry["unspent"] == entry["budget"]["amount"]
        assert entry["unspent"] >= 0
    trainer.save_model(str(tmp_path / "adapter"))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = {key.split(".lora_A")[0][17:]: len(value) for key, value in tensors.items() if ".lora_A" in key}
    assert ranks == {site: rank for site, rank in found[-1]["ranks"].items() if rank}
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert stock.peft_config["default"].peft_type == "LORA"
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        ours, theirs = model.eval()(input_ids=ids).logits, stock.eval()(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - base).abs().max() > 1e-3


@EVERY
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_training_equals_uninterrupted(allocation: Any, accumulation: int, tmp_path: Path) -> None:
    kept = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": accumulation}
    whole, resumed = adapted(allocation), adapted(allocation)
    first = train(whole, tmp_path, **kept)
    second = train(resumed, tmp_path, resume=str(tmp_path / "checkpoint-3"), **kept)
    assert decisions(first.state.log_history) == decisions(second.state.log_history)
    expected, found = state(whole), state(resumed)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@EVERY
def test_resumed_from_a_checkpoint_of_a_revision(allocation: Any, tmp_path: Path) -> None:
    """What opened at step 4 has its state in the optimizer when that step's checkpoint is written."""
    kept = {"save_strategy": "steps", "save_steps": 2}
    whole, resumed = adapted(allocation), adapted(allocation)
    train(whole, tmp_path, **kept)
    train(resumed, tmp_path, resume=str(tmp_path / "checkpoint-4"), **kept)
    expected, found = state(whole), state(resumed)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_training_again_after_an_interruption_has_one_drive(tmp_path: Path) -> None:
    driving: list[int] = []

    class Interrupting(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, LoraplexCallback))
            driving.append(len(callback.parts[0].controllers))
            if len(driving) == 3:
                raise KeyboardInterrupt

    trainer = Trainer(adapted(MOVING), arguments(tmp_path), train_dataset=ROWS, callbacks=[Interrupting()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert driving == [1] * (3 + 6)


def test_an_epoch_has_the_steps_that_the_trainer_gives_it(tmp_path: Path) -> None:
    """8 batches by threes are 3 steps."""
    model = adapted(ALoRA(rounds=1, warmup_epochs=1.0, ranks_per_round=3))
    trainer = train(model, tmp_path, gradient_accumulation_steps=3, num_train_epochs=2)
    assert [entry["step"] for entry in decisions(trainer.state.log_history)] == [3]


def test_ending_before_the_first_revision_is_said(caplog: pytest.LogCaptureFixture) -> None:
    drive = start_allocation(adapted(HeteroLoRA(batches=2, warm_up=3)), batches(), total_steps=9)
    drive.finish()
    assert "adapter 'default' ends with 14 of 3 modules: training stopped" in caplog.text


def test_a_loop_of_ones_own_goes_on_where_it_stopped() -> None:
    whole = adapted(DYNAMIC)
    drive = start_allocation(whole, batches(), total_steps=9)
    for _ in range(3):
        drive.step()
    resumed = adapted(DYNAMIC)
    resumed.load_state_dict(whole.state_dict())
    again = start_allocation(resumed, batches(), total_steps=9, done=3)
    assert again.decisions == []
    expected, found = state(whole), state(resumed)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    drive.step()
    again.step()
    assert [one.describe() for one in again.decisions] == [drive.decisions[-1].describe()]


def test_alora_gives_ranks_of_pissa_anew() -> None:
    model = adapted(MOVING, adapter={"name": "lora", "init": "pissa"}).train()
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    drive = start_allocation(model, batches(), total_steps=9)
    for index in range(4):
        step(model, made, index)
        drive.step()
    assert [(one.spent, one.revision.remark) for one in drive.decisions] == [(56, "")] * 2


def test_the_best_checkpoint_is_finished(tmp_path: Path) -> None:
    model = adapted(DYNAMIC)
    data = ROWS
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
        ),
        train_dataset=data,
        eval_dataset=data,
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
    trainer.save_model(str(tmp_path / "adapter"))
    assert '"peft_type": "LORA"' in (tmp_path / "adapter" / "adapter_config.json").read_text()


@EVERY
def test_a_checkpoint_on_the_way_is_our_own_type(allocation: Any, tmp_path: Path) -> None:
    train(adapted(allocation), tmp_path, save_strategy="steps", save_steps=3)
    assert '"peft_type": "LORAPLEX"' in (tmp_path / "checkpoint-3" / "adapter_config.json").read_text()
    tensors = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert sum(key.endswith("factors.gate") for key in tensors) == 14


@TRL
def test_an_unmodified_sft_trainer_drives_too(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokens = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in ROWS]
    config = AdapterConfig(allocation=DYNAMIC, r=4, target_modules="all-linear", seed=0, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        llama(),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(tokens),
        peft_config=config,
        processing_class=letters(),
    )
    trainer.train()
    assert [entry["step"] for entry in decisions(trainer.state.log_history)] == [0, 2]
    assert trainer.model.peft_config["default"].state.finished_ranks is not None


@pytest.mark.parametrize("by", ["site", "kind"])
def test_alora_keeps_its_budget_and_its_scale(by: str) -> None:
    model = adapted(
        ALoRA(
            rounds=3,
            warmup_epochs=1,
            interval_epochs=1,
            in_steps=True,
            group_by=by,
            ranks_per_round=2 if by == "kind" else 5,
        )
    ).train()
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    drive = start_allocation(model, batches(), total_steps=5)
    for index in range(5):
        step(model, made, index)
        drive.step()
    assert [decision.step for decision in drive.decisions] == [1, 2, 3]
    for decision in drive.decisions:
        assert decision.budget.amount == 4 * 14
        assert decision.spent <= 56
        assert len(set(decision.plan.ranks.values())) > 1
    assert {layer.adapter("default").factors.scale for layer in model.base_model.site_layers()} == {1.5}
    if by == "kind":
        for ranks in drive.decisions[-1].plan.ranks, model.peft_config["default"].state.finished_ranks:
            kinds = {}
            for site, rank in ranks.items():
                kinds.setdefault(site.rpartition(".")[2], set()).add(rank)
            assert all(len(found) == 1 for found in kinds.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_objective_goes_together_with_an_allocation(checkpointing: bool, tmp_path: Path) -> None:
    """Both are live in checkpoints, resumed exactly, and gone at the end."""
    kept = {"save_strategy": "steps", "save_steps": 3, "gradient_checkpointing": checkpointing}
    rows = [{**row, "labels": [-100] * 6 + row["labels"][6:]} for row in ROWS]
    states = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = adapted(DYNAMIC, objective={"name": "echo", "targets": [0], "sources": [2]})
        trainer = Trainer(model, arguments(tmp_path, **kept), train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        assert [entry["step"] for entry in decisions(trainer.state.log_history)] == [0, 2, 4]
        states.append(state(model))
    live = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert sum(key.endswith("factors.gate") for key in live) == 14
    assert any(".objective." in key for key in live)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    trainer.save_model(str(tmp_path / "adapter"))
    assert '"peft_type": "LORA"' in (tmp_path / "adapter" / "adapter_config.json").read_text()
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {key.rpartition(".lora_")[2] for key in found} == {"A.weight", "B.weight"}
    assert len(found) == 2 * 3
