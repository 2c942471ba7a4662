"""A plan as input: exactly its ranks are trained, at the scale of training, under every method and in plain PEFT."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.allocation.scenes import batches
from tests.tuner.tiny_models import config, gpt2, llama, logits, move, tokens
from torch import nn

from loraplex import AdapterConfig, HeteroLoRA, UserError, start_allocation
from loraplex.allocation.plan import Plan
from loraplex.allocation.uniform import Uniform
from loraplex.tuner.layer import SiteLayer
from loraplex.tuner.shortcuts.layers import shortcut_layers

EDITED = {
    "model.layers.0.self_attn.q_proj": 4,
    "model.layers.1.self_attn.q_proj": 0,
    "model.layers.0.mlp.up_proj": 7,
    "model.layers.1.mlp.down_proj": 1,
}
"""Written by hand: a rank above r, a site at 0, and most sites not named."""
ADAPTED = {site: rank for site, rank in EDITED.items() if rank}


def adapted(plan: Any, **fields: Any) -> PeftModel:
    return get_peft_model(llama(), config(allocation={"name": "uniform", "plan": plan}, **fields))


def ranks(model: nn.Module) -> dict[str, int]:
    return {m.site: m.adapter("default").factors.rank for m in model.modules() if isinstance(m, SiteLayer)}


def test_the_plan_of_a_run_is_trained_again(tmp_path: Path) -> None:
    """What an allocation has found, as its plan.json, gives the same sites, ranks and scales from the start."""
    found = get_peft_model(
        llama(),
        config(allocation=HeteroLoRA(batches=2, share=0.4, unit="ranks", ranks="proportional"), r=6, lora_alpha=9),
    )
    start_allocation(found, batches(), total_steps=1).step()
    left = {m.site: m.adapter("default").factors.open_ranks for m in found.base_model.site_layers()}
    assert len(set(left.values())) > 2
    assert 0 in left.values()
    Plan(left).save(tmp_path / "plan.json")
    model = adapted(str(tmp_path / "plan.json"), r=6, lora_alpha=9)
    assert ranks(model) == {site: rank for site, rank in left.items() if rank}
    assert [m.adapter("default").factors.scale for m in model.base_model.site_layers()] == pytest.approx(
        [1.5] * len(ranks(model))
    )
    off = [site for site, rank in left.items() if not rank]
    assert all(type(model.base_model.model.get_submodule(site)) is nn.Linear for site in off)


def test_a_plan_says_which_shortcuts_there_are(tmp_path: Path) -> None:
    """Of a residual edge as of a linear layer: its rank, at the scale of the shortcuts' own r and alpha."""
    open_edge, closed, other = (
        f"model.layers.{i}.residual_{kind}" for i, kind in ((1, "mlp"), (0, "mlp"), (0, "attention"))
    )
    plan = {**ADAPTED, open_edge: 3, closed: 0}
    model = adapted(plan, r=4, lora_alpha=6)
    edges = {layer.site: layer.adapter("default").factors for layer in shortcut_layers(model)}
    assert {site: factors.rank for site, factors in edges.items()} == {open_edge: 3}
    assert edges[open_edge].scale == pytest.approx(4 / 8)
    assert ranks(model) == ADAPTED
    expected = logits(move(model).eval())
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), str(tmp_path)).eval()), expected)
    with pytest.raises(UserError, match="no linear layer a rank above 0"):
        adapted({other: 2})
    with pytest.raises(UserError, match=r"layers\.7\.residual_mlp"):
        adapted({**ADAPTED, "model.layers.7.residual_mlp": 2})


@pytest.mark.parametrize("adapter", ["lora", "dora", {"name": "lora", "use_rslora": True}])
def test_what_is_saved_is_plain_peft(adapter: Any, tmp_path: Path) -> None:
    model = move(adapted(EDITED, adapter=adapter, r=4, lora_alpha=6)).eval()
    model.save_pretrained(str(tmp_path))
    stock = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert isinstance(stock.peft_config["default"], LoraConfig)
    assert stock.peft_config["default"].target_modules == set(ADAPTED)
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-5)
    assert (logits(model) - logits(llama())).abs().max() > 1e-3
    again = AdapterConfig.from_peft(str(tmp_path))
    assert {site: again.rank_of(site) for site in ADAPTED} == ADAPTED


def test_a_type_of_our_own_reloads_without_the_plan(tmp_path: Path) -> None:
    Plan(EDITED).save(tmp_path / "plan.json")
    model = move(adapted(str(tmp_path / "plan.json"), adapter="hydra")).eval()
    (tmp_path / "plan.json").unlink()
    model.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(llama(), str(tmp_path / "adapter")).eval()
    assert ranks(again) == ADAPTED
    assert torch.equal(logits(again), logits(model))


def test_targets_may_be_absent_and_namesakes_are_left_alone() -> None:
    assert ranks(adapted(EDITED, target_modules=None)) == ADAPTED
    base = nn.ModuleDict({"q": nn.Linear(6, 6), "block": nn.ModuleDict({"q": nn.Linear(6, 6)})})
    fields = {"r": 2, "target_modules": ["q"], "seed": 0}
    model = get_peft_model(base, AdapterConfig(allocation=Uniform(plan={"q": 3}), **fields))
    assert ranks(model) == {"q": 3}
    names = get_peft_model(gpt2(), config(allocation=Uniform(plan={"transformer.h.1.attn.c_attn": 2})))
    assert ranks(names) == {"transformer.h.1.attn.c_attn": 2}


def test_the_configured_ranks_and_alphas_give_the_scale() -> None:
    model = adapted(EDITED, r=4, lora_alpha=6, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 1})
    scales = {m.site: m.adapter("default").factors.scale for m in model.base_model.site_layers()}
    assert scales == pytest.approx(dict(zip(ADAPTED, (3.0, 1.5, 0.25), strict=True)))


@pytest.mark.parametrize(
    ("plan", "fields", "words"),
    [
        ({"model.layers.0.self_attn.q_prj": 2}, {}, "none of the 14 sites .*Did you mean '.*q_proj'"),
        (
            {"model.layers.2.self_attn.q_proj": 0, **EDITED},
            {},
            "names 'model.layers.2.self_attn.q_proj', which is none",
        ),
        (EDITED, {"target_modules": ["q_proj"]}, "'model.layers.0.mlp.up_proj', which is none of the 2 sites"),
        ({"model.layers.0.self_attn.k_proj": 33}, {}, "rank of model.layers.0.self_attn.k_proj is 33, .* at most 32"),
        ({"model.layers.0.self_attn.q_proj": 0}, {}, "gives no site a rank above 0"),
        ({"model.layers.0.self_attn.q_proj": "4"}, {}, "plan gives rank '4'"),
        (3, {}, "plan is 3: give the path of a plan.json, or ranks by site name"),
        ("nowhere/plan.json", {}, "no plan at nowhere/plan.json"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        adapted(plan, **fields)


def test_a_plan_is_one_site_a_line(tmp_path: Path) -> None:
    """So that `diff` shows what has changed, and nothing else."""
    for name, plan in (("a", EDITED), ("b", {**EDITED, "model.layers.0.mlp.up_proj": 8})):
        Plan(plan).save(tmp_path / name)
    a, b = ((tmp_path / name).read_text().splitlines() for name in "ab")
    changed = [pair for pair in zip(a, b, strict=True) if pair[0] != pair[1]]
    assert [re.sub(r"[ ,]", "", line) for line in changed[0]] == [f'"model.layers.0.mlp.up_proj":{r}' for r in (7, 8)]
    assert len(changed) == 1
    assert list(json.loads((tmp_path / "a").read_text())["ranks"]) == list(EDITED)


def test_gradients_reach_only_what_the_plan_names() -> None:
    model = adapted(EDITED).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".loraplex_")[0].removeprefix("base_model.model.") for name in moved} == set(ADAPTED)
