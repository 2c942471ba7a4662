"""Shortcuts as candidates: their share, their scores, and what a trainer makes of them, also when it is resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.allocation.scenes import adapted, batches, context
from tests.allocation.test_driving import arguments, state, train
from tests.reference import shortcuts as reference
from tests.tuner.tiny_models import bert, llama
from torch.nn import functional as F
from transformers import Trainer

from loraplex import AdapterConfig, HeteroLoRA, UserError
from loraplex.allocation.contracts import Candidate, ScoringContext
from loraplex.allocation.proxies import Scoring, score
from loraplex.allocation.sites import EDGES, Site, is_edge
from loraplex.training_hooks.allocation_in_trainer import decisions
from loraplex.tuner.candidates import candidates_of
from loraplex.tuner.counting import count_parameters

SHORTCUTS = {"name": "uniform", "shortcuts": True, "shortcut_r": 2}
STATIC = HeteroLoRA(batches=2, shortcuts=True, shortcut_r=2)
DYNAMIC = HeteroLoRA(batches=2, interval=2, shortcuts=True, shortcut_r=2, separate_rankings=True)


def made(allocation: Any, **fields: Any) -> PeftModel:
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "seed": 0, "task_type": "CAUSAL_LM", **fields}
    return get_peft_model(llama(), AdapterConfig(allocation=allocation, **options))


@pytest.mark.parametrize("identity", [False, True], ids=["trained", "initial"])
def test_grad_norm_and_snip_of_a_shortcut_equal_their_definition(identity: bool) -> None:
    model = adapted(identity, allocation=SHORTCUTS)
    base, pairs = llama().double(), {}
    for candidate in candidates_of(model.base_model, "default"):
        if candidate.site.edge:
            a, b = (part.detach().clone().requires_grad_() for part in candidate.adapter.factors.raw_pair())
            pairs[candidate.site.layer, candidate.site.kind] = (a, b, candidate.adapter.factors.scale)
        else:
            with torch.no_grad():
                weight = base.get_submodule(candidate.name).weight
                weight += candidate.layer.get_delta_weight("default")
    weights = dict(base.named_parameters())
    for batch in batches():
        logits = reference.llama(base, weights, pairs, batch["input_ids"])
        # padding is on the right, where no causal model looks back from
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
        loss.backward()
    names = {place: f"model.layers.{place[0]}.{place[1]}" for place in pairs}
    norms = {names[place]: float(a.grad.norm() + b.grad.norm()) for place, (a, b, _) in pairs.items()}
    found = score("grad_norm", context(model), Scoring())
    assert {name: value for name, value in found.items() if is_edge(name)} == pytest.approx(norms, rel=1e-7)
    assert len(norms) == 7
    products = {
        names[place]: float((a * a.grad).abs().sum() + (b * b.grad).abs().sum()) for place, (a, b, _) in pairs.items()
    }
    snip = score("snip", context(model), Scoring())
    assert {name: value for name, value in snip.items() if is_edge(name)} == pytest.approx(products, rel=1e-7)
    assert any(products.values()) is not identity


@pytest.mark.parametrize("proxy", ["grasp", "synflow", "alpha_test", "constant"])
def test_the_other_proxies_score_shortcuts_and_leave_nothing_behind(proxy: str) -> None:
    model = adapted(allocation=SHORTCUTS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = score(proxy, context(model), Scoring(tolerance=2e-4))
    assert sum(is_edge(name) for name in found) == 7
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    if proxy != "constant":
        assert len({value for name, value in found.items() if is_edge(name)}) > 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"proxy": "fisher"}, "proxy fisher looks at the frozen weight of a site, and shortcuts have none"),
        (
            {"score_target": "frozen"},
            "score_target: frozen looks at the frozen weight of a site, and shortcuts have none",
        ),
        ({"separate_rankings": "three"}, "separate_rankings is 'three': give true or false"),
    ],
)
def test_what_shortcuts_cannot_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        HeteroLoRA(shortcuts=True, **options)
    if "separate_rankings" not in options:
        model = adapted(allocation=SHORTCUTS)
        how = Scoring(of=options.get("score_target", "adapter"))
        with pytest.raises(UserError, match="is a shortcut, which has no frozen weight"):
            score(options.get("proxy", "grad_norm"), context(model), how)


@pytest.fixture(scope="module")
def forty() -> list[Candidate]:
    """20 linear sites and 21 edges."""
    first, *_, last = candidates_of(made(SHORTCUTS).base_model, "default")
    sites = [Site(f"layers.{i}.q_proj", 8, 8, bias=False) for i in range(20)]
    sites += [Site(f"layers.{i}.{EDGES[i % 4]}", 8, 8, bias=False) for i in range(21)]
    return [Candidate(site, c.layer, c.adapter, c.weight) for site in sites for c in [last if site.edge else first]]


@settings(max_examples=200, deadline=None)
@given(
    linear=st.integers(1, 20),
    edges=st.integers(0, 21),
    share=st.floats(0.01, 1),
    separate=st.booleans(),
    unit=st.sampled_from(["modules", "ranks", "parameters"]),
    seed=st.integers(0, 99),
)
def test_the_budget_is_floor_plus_round_and_never_exceeded(forty, linear, edges, share, separate, unit, seed) -> None:
    chosen = [*forty[:linear], *forty[20 : 20 + edges]]
    hetero = HeteroLoRA(proxy="constant", share=share, unit=unit, separate_rankings=separate, shortcuts=True)
    _, budget = hetero.start(chosen, lambda site: 4)
    if unit == "modules":
        assert budget.amount == int(share * linear + 1e-9) + round(share * edges)
    revision = hetero.revise(ScoringContext(chosen, budget, [], torch.nn.Module(), 0, seed))
    assert budget.spent(chosen, revision.plan.ranks) <= budget.amount
    if unit == "modules":
        on = revision.plan.adapted
        assert len(on) == budget.amount
        if separate:
            assert sum(is_edge(name) for name in on) == round(share * edges)


@pytest.mark.parametrize("allocation", [STATIC, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "reentrant"])
def test_a_trainer_drives_them_and_the_result_is_reloaded(allocation: HeteroLoRA, checkpointing: bool, tmp_path: Path):
    model = made(allocation)
    changed = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = train(model, tmp_path, **(changed if checkpointing else {}))
    found = decisions(trainer.state.log_history)
    assert sum(is_edge(site) for site in found[-1]["ranks"]) == 7
    assert "model.layers.1.shortcut_mlp" in found[-1]["ranks"]
    # 14 linear sites, 7 shortcuts
    assert found[-1]["budget"] == {"amount": 3 + 2, "unit": "modules"}
    opened = [site for site, rank in found[-1]["ranks"].items() if rank and is_edge(site)]
    if allocation is DYNAMIC:
        assert len(opened) == 2
    assert opened
    trainer.save_model(str(tmp_path / "adapter"))
    assert '"peft_type": "LORAPLEX"' in (tmp_path / "adapter" / "adapter_config.json").read_text()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    sites = {key.removeprefix("base_model.model.").split(".loraplex_adapters")[0] for key in tensors}
    assert sites == {site for site, rank in found[-1]["ranks"].items() if rank}
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, again(input_ids=ids).logits)
    # what was trained on has not moved where it was closed
    assert {layer.site for layer in again.base_model.adapter_layers()} == sites


@pytest.mark.parametrize("allocation", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_resumed_training_equals_uninterrupted(allocation: HeteroLoRA, tmp_path: Path) -> None:
    kept = {"save_strategy": "steps", "save_steps": 3}
    whole, resumed = made(allocation), made(allocation)
    first = train(whole, tmp_path, **kept)
    second = train(resumed, tmp_path, resume=str(tmp_path / "checkpoint-3"), **kept)
    assert decisions(first.state.log_history) == decisions(second.state.log_history)
    expected, found = state(whole), state(resumed)
    assert sum("shortcut" in name or "residual" in name for name in expected) == 7 * 3
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_encoder_keeps_its_head_and_its_shortcuts(tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(5 + i, 12 + i)), "labels": i % 3} for i in range(16)]
    options = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "r": 4, "seed": 1}
    allocation = HeteroLoRA(batches=2, interval=2, share=0.4, shortcuts=True, separate_rankings=True)
    model = get_peft_model(bert(), AdapterConfig(allocation=allocation, **options))
    trainer = Trainer(model, arguments(tmp_path, max_steps=5), train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(bert(), tmp_path / "adapter").eval()
    ranks = decisions(trainer.state.log_history)[-1]["ranks"]
    kept = {layer.site for layer in again.base_model.adapter_layers()}
    assert kept == {site for site, rank in ranks.items() if rank}
    assert any(is_edge(site) for site in kept)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        found, expected = again(input_ids=ids).logits, model.eval()(input_ids=ids).logits
        assert torch.equal(found, expected)
        assert not torch.equal(found, bert()(input_ids=ids).logits)


def test_shortcuts_that_all_lose_leave_plain_lora(tmp_path: Path) -> None:
    # ⌊.2·14⌋ = 2 linear sites, round(.2·2) = 0 shortcuts
    model = made(HeteroLoRA(batches=2, share=0.2, separate_rankings=True, shortcuts="residual_mlp", shortcut_r=2))
    trainer = train(model, tmp_path)
    trainer.save_model(str(tmp_path / "adapter"))
    assert '"peft_type": "LORA"' in (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * 2


def test_parameters_and_budget_count_shortcuts_once() -> None:
    model, plain = made(STATIC), made(HeteroLoRA(batches=2))
    trainable = [m.get_nb_trainable_parameters()[0] for m in (model, plain)]
    assert trainable[0] - trainable[1] == 7 * 2 * 2 * 32
    counted = count_parameters(model)
    assert str(counted.budget) == "5 modules"
    assert counted.most == sum(sorted((4 * (i + o) for i, o in _shapes(model)), reverse=True)[:5])


def _shapes(model: PeftModel) -> list[tuple[int, int]]:
    return [(layer.in_features, layer.out_features) for layer in model.base_model.site_layers()]
