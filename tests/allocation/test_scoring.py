"""Scores are those of the model as it trains, and find an answer that was planted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.allocation.moving import ROWS, adapted, step, train
from tests.allocation.scenes import batches
from tests.tuner.tiny_models import llama

from loraplex import AdapterConfig, ALoRA, HeteroLoRA, start_allocation
from loraplex.training_hooks.allocation_in_trainer import decisions

ANSWER = {f"model.layers.0.mlp.{kind}" for kind in ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off_while_sites_are_scored(checkpointing: bool) -> None:
    found = []
    for dropout in (0.0, 0.5):
        model = adapted(HeteroLoRA(batches=2), lora_dropout=dropout, init_lora_weights=False).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        found.append(start_allocation(model, batches(), total_steps=9).decisions[0].revision.scores)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_scores_are_taken_under_the_autocast_of_training(tmp_path: Path) -> None:
    rows = [{key: torch.tensor([ROWS[i][key], ROWS[i + 1][key]]) for key in ROWS[0]} for i in (0, 2)]

    def scores(dtype: torch.dtype | None) -> dict[str, float]:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            drive = start_allocation(adapted(HeteroLoRA(batches=2)), rows, total_steps=8)
        return dict(drive.decisions[0].revision.scores)

    for given, dtype in (({}, None), ({"bf16": True}, torch.bfloat16)):
        found = decisions(train(adapted(HeteroLoRA(batches=2)), tmp_path, **given).state.log_history)[0]["scores"]
        assert found == pytest.approx(scores(dtype), rel=1e-6)
    assert found != pytest.approx(scores(None), rel=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_scores_are_those_of_the_models_own_loss(attention: str) -> None:
    """Scoring leaves out padding and logits that carry no label; its numbers are those of the model's own call."""
    for allocation in (
        HeteroLoRA(batches=3),
        HeteroLoRA(batches=3, proxy="snip", scoring_init="random"),
        ALoRA(batches=2, warmup_epochs=0.5),
    ):
        model = adapted(allocation, init_lora_weights=False)
        model.base_model.model.set_attn_implementation(attention)
        drive = start_allocation(model, batches(), total_steps=9)
        context = drive.context()
        assert context.quick is not None
        for batch in context.batches:
            torch.testing.assert_close(context.loss_alone(batch), context.loss(batch), rtol=1e-5, atol=1e-6)
        quick = allocation.revise(context)
        slow = allocation.revise(replace(context, quick=None))
        assert quick.scores == pytest.approx(slow.scores, rel=1e-3, abs=1e-6)
        assert quick.plan == slow.plan


def test_warm_up_steps_let_a_blind_proxy_see(tmp_path: Path) -> None:
    trainer = train(adapted(HeteroLoRA(proxy="snip", batches=2, warm_up=2)), tmp_path)
    (found,) = decisions(trainer.state.log_history)
    assert found["step"] == 2
    assert len(set(found["scores"].values())) == 14


def planted() -> PeftModel:
    """Only three sites can change anything: the other paths through the blocks are cut in the frozen model."""
    base = llama()
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.v_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        base.model.layers[1].mlp.up_proj.weight.zero_()
        base.model.layers[1].mlp.down_proj.weight.zero_()
    return base


@pytest.mark.parametrize("proxy", ["grad_norm", "constant"])
def test_a_planted_answer_is_found(proxy: str) -> None:
    shares = []
    for seed in range(8):
        config = AdapterConfig(
            allocation=HeteroLoRA(proxy=proxy, batches=2),
            r=4,
            target_modules="all-linear",
            seed=seed,
            task_type="CAUSAL_LM",
        )
        drive = start_allocation(get_peft_model(planted(), config), batches(), total_steps=3)
        ranks = drive.decisions[0].plan.ranks
        shares.append(sum(rank for site, rank in ranks.items() if site in ANSWER) / sum(ranks.values()))
    mean = sum(shares) / len(shares)
    assert mean >= 0.8 if proxy == "grad_norm" else mean <= 0.5


def test_ab_lora_finds_a_planted_answer() -> None:
    """8 steps, 14 sites of rank 2: the 22 ranks at the others are missed least, so they go to the three that matter."""
    config = AdapterConfig(
        allocation=ALoRA(rounds=1, warmup_epochs=8, in_steps=True, ranks_per_round=22, growth=5),
        r=2,
        target_modules="all-linear",
        seed=0,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(planted(), config).train()
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
    drive = start_allocation(model, batches(), total_steps=9)
    for index in range(9):
        step(model, made, index)
        drive.step()
    ranks = drive.decisions[-1].plan.ranks
    assert sum(rank for site, rank in ranks.items() if site in ANSWER) >= 0.8 * sum(ranks.values())
