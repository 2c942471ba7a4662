"""The objective under trainers as they are: Trainer, SFTTrainer, a plain loop; and what comes after."""

import json
from copy import deepcopy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.extras import TRL
from tests.objectives.echo_trainers import KINDS, RANDOM, fresh, history, run
from tests.objectives.echoing import BLOCKS, BOUNDARIES, echoing, items, objective_of, options, padded, rows, targets_of
from tests.reference import echo as oracle
from tests.tuner.tiny_models import llama, logits, same
from transformers import TrainerCallback

import loraplex
from loraplex.objectives.plain import Plain


@KINDS
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("attention", "exact"), [("eager", 1e-6), ("sdpa", 1e-5)])
def test_the_first_step_is_the_oracles(kind, accumulation, attention, exact, tmp_path):
    """SGD at rate 1: what the parameters move by is the gradient that the trainer had.

    With sdpa the rows lose their padding and the second pass looks back, where Llama rounds its norms to float32.
    """
    base = llama(num_hidden_layers=BLOCKS)
    base.set_attn_implementation(attention)
    model = echoing(options(), base=base, moved=True)
    start = deepcopy(model)
    size = 6 // accumulation
    trainer = run(
        kind, model, tmp_path, max_steps=1, per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=1.0, weight_decay=0.0, max_grad_norm=0.0,
        lr_scheduler_type="constant", gradient_checkpointing=False,
    )  # fmt: skip
    batches = []
    original = trainer.training_step

    def training_step(module, inputs, *rest, **more):
        batches.append({key: value.clone() for key, value in inputs.items() if torch.is_tensor(value)})
        return original(module, inputs, *rest, **more)

    trainer.training_step = training_step
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert len(batches) == accumulation
    given = [
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
        for batch in batches
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ]
    value, _ = oracle.loss(start, given, items=items(given), boundaries=BOUNDARIES, targets=targets_of(start))
    assert history(trainer)[0] == pytest.approx(float(value), rel=1e-5)
    wanted = {name: p for name, p in start.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    for (name, before), gradient in zip(wanted.items(), expected, strict=True):
        rate = 1e-3 if "objective" in name else 1.0
        moved = (before - named[name]) / rate
        gradient = torch.zeros_like(before) if gradient is None else gradient
        torch.testing.assert_close(moved, gradient, rtol=exact, atol=exact / 1000, msg=name)
    computed = trainer.state.log_history[0]["echo/computed_again"]
    assert computed < 0.8 if attention == "sdpa" else computed == 1


@KINDS
def test_parts_are_logged_and_the_adapter_is_plain_at_the_end(kind, tmp_path):
    trainer = run(kind, fresh(), tmp_path, max_steps=6)
    trainer.train()
    for part in ("loss_off", "routed"):
        assert len(history(trainer, f"echo/{part}")) == 6
    assert 0 < sum(value > 0 for value in history(trainer, "echo/routed")) < 6
    assert len(history(trainer, "echo/gate")) == len(history(trainer, "echo/loss_on")) < 6
    assert trainer.model.peft_config["default"].objective == Plain()
    trainer.save_model(tmp_path / "saved")
    stock = PeftModel.from_pretrained(llama(num_hidden_layers=BLOCKS), tmp_path / "saved")
    assert type(stock.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(logits(stock), logits(trainer.model.eval()), rtol=0, atol=1e-5)


@KINDS
@pytest.mark.parametrize("routing", ["step", "sample"])
def test_four_small_batches_equal_one_large(kind, routing, tmp_path):
    found = []
    for size, accumulation in ((4, 1), (1, 4)):
        trainer = run(
            kind, fresh({**RANDOM, "routing": routing}, moved=True), tmp_path, learning_rate=1e-4,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        found.append([history(trainer, key) for key in ("loss", "grad_norm", "echo/routed")])
    large, small = found
    assert large[0] == pytest.approx(small[0], rel=1e-4)
    assert large[1] == pytest.approx(small[1], rel=1e-3)
    assert large[2] == pytest.approx(small[2])
    assert len(set(large[2])) > 1


@KINDS
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, adapter, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = run(kind, fresh(adapter=adapter, lora_dropout=0.2), tmp_path / "whole", **saving)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-2"
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORAPLEX"
    assert saved["objective"] == RANDOM
    assert any("echo_up" in key for key in load_file(folder / "adapter_model.safetensors"))
    # it starts elsewhere, with another seed: everything comes from the checkpoint
    other = run(kind, fresh(adapter=adapter, lora_dropout=0.2, seed=99), tmp_path / "other")
    other.train(resume_from_checkpoint=str(folder))
    assert history(other)[-2:] == history(whole)[-2:]
    assert same(other.model.state_dict(), whole.model.state_dict())


@KINDS
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing_changes_nothing(kind, reentrant, tmp_path):
    found = []
    for checkpointing in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        trainer = run(kind, fresh(options()), tmp_path, max_steps=3, **checkpointing)
        trainer.train()
        found.append((history(trainer), history(trainer, "grad_norm")))
    assert found[0] == found[1]


@TRL
def test_trls_padding_free_batches_pool_each_sequence_for_itself(tmp_path):
    found = []
    for padding_free, signal in ((False, "pooled"), (True, "pooled"), (True, "another")):
        base = llama(num_hidden_layers=BLOCKS)
        base.set_attn_implementation("loraplex_packed")
        model = fresh(options(signal=signal), base=base, moved=True)
        trainer = run("sft", model, tmp_path, padding_free=padding_free, learning_rate=1e-4)
        trainer.train()
        found.append([history(trainer, key) for key in ("loss", "grad_norm", "echo/distillation", "echo/loss_on")])
    by_row, flat, of_another = found
    for one, other in zip(by_row, flat, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    # whose echo it is can be seen in these numbers
    assert of_another[-2:] != [pytest.approx(values, rel=1e-2) for values in flat[-2:]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16(attention, tmp_path):
    """Weights in bfloat16, and autocast: every part of the loss is what float32 gives, as near as bfloat16 comes."""
    found = []
    for kind in ("float32", "autocast", "weights"):
        base = llama(num_hidden_layers=BLOCKS)
        base.set_attn_implementation(attention)
        dtype = torch.bfloat16 if kind == "weights" else torch.float32
        model = fresh(options(), base=base, dtype=dtype, moved=True)
        trainer = run("trainer", model, tmp_path, bf16=kind == "autocast", learning_rate=1e-4)
        trainer.train()
        found.append({part: history(trainer, f"echo/{part}") for part in ("loss_on", "loss_off", "distillation")})
    gains = [[on - off for on, off in zip(parts["loss_on"], parts["loss_off"], strict=True)] for parts in found]
    # what the echo does is above what bfloat16 may change of it
    assert max(map(abs, gains[0])) > 0.04
    for parts, gain in zip(found[1:], gains[1:], strict=True):
        assert parts["loss_off"] == pytest.approx(found[0]["loss_off"], rel=5e-3)
        assert gain == pytest.approx(gains[0], abs=0.02)
        assert parts["distillation"] == pytest.approx(found[0]["distillation"], rel=0.4)


def test_the_networks_learn_at_their_own_rate_and_do_not_decay(tmp_path):
    """As two groups would have it that a scheduler knows: rate 1e-3 at the peak, weight decay 0."""
    ends = []
    for two_groups in (False, True):
        model = fresh(options(learning_rate=5e-3))
        trainer = run("trainer", model, tmp_path, max_steps=4, warmup_steps=2)
        if two_groups:
            networks = list(objective_of(model).parameters())
            others = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in networks)]
            groups = [
                {"params": others, "lr": 1e-2, "weight_decay": 0.1},
                {"params": networks, "lr": 5e-3, "weight_decay": 0.0},
            ]
            trainer.optimizer = torch.optim.AdamW(groups, fused=True)
            objective_of(model).rates = lambda: iter(())
        kept = {}
        trainer.add_callback(_Keeping(kept))
        trainer.train()
        ends.append(kept)
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-6, atol=1e-8, msg=name)


class _Keeping(TrainerCallback):
    def __init__(self, kept):
        self.kept = kept

    def on_step_end(self, args, state, control, **kwargs):
        named = kwargs["model"].named_parameters()
        self.kept.update({name: p.detach().clone() for name, p in named if p.requires_grad})


def test_a_plain_loop_counts_its_own_steps_and_goes_on_from_a_checkpoint(tmp_path):
    def loop(model, steps, optimizer):
        found = []
        for _ in range(steps):
            loss = model(**padded(rows())).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    def sgd(model):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    objective = {**RANDOM, "ramp": 3}
    model = fresh(objective)
    whole = loop(model, 6, sgd(model))
    assert objective_of(model).step == 6
    first = fresh(objective)
    assert loop(first, 3, sgd(first)) == whole[:3]
    first.save_pretrained(tmp_path)
    for again in (
        PeftModel.from_pretrained(llama(num_hidden_layers=BLOCKS), tmp_path, is_trainable=True),
        loraplex.load_adapter(llama(num_hidden_layers=BLOCKS), str(tmp_path), is_trainable=True),
        PeftModel.from_pretrained(llama(num_hidden_layers=BLOCKS), tmp_path, is_trainable=True, low_cpu_mem_usage=True),
    ):
        assert objective_of(again).step == 3
        assert loop(again.train(), 3, sgd(again)) == whole[3:]


def test_the_end_of_training_ends_the_objective_of_what_was_trained(tmp_path):
    model = fresh(options())
    model.add_adapter("other", fresh(options()).peft_config["default"])
    model.set_adapter("default")
    run("trainer", model, tmp_path, max_steps=1).train()
    assert list(model.base_model.objectives()) == ["other"]


def test_a_training_after_the_end_of_the_objective_says_that_it_is_plain(tmp_path):
    trainer = run("trainer", fresh(options()), tmp_path, max_steps=1)
    trainer.train()
    with pytest.warns(UserWarning, match="the objective 'echo' of adapter 'default' ended.*build the model"):
        trainer.train()
    assert not history(trainer, "echo/gate")


def test_a_finished_training_goes_on_as_the_warning_says(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    objective = {**RANDOM, "ramp": 3}
    whole = run("trainer", fresh(objective), tmp_path / "whole", **saving)
    whole.train()
    run("trainer", fresh(objective), tmp_path / "half", max_steps=2, **saving).train()
    longer = run("trainer", fresh(objective), tmp_path / "half", **saving)
    longer.train(resume_from_checkpoint=True)
    assert history(longer) == history(whole)
