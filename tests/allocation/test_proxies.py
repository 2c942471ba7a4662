"""Proxies against their definitions in float64, and what scoring leaves behind: nothing."""

import gc

import pytest
import torch
from tests.allocation.scenes import adapted, batches, context, pairs
from tests.reference import proxies as reference
from tests.tuner.tiny_models import llama

from loraplex import HeteroLoRA, UserError
from loraplex.allocation.alora import _importance
from loraplex.allocation.proxies import PROXIES, Scoring, score


def base():
    return llama().double()


@pytest.mark.parametrize("proxy", ["grad_norm", "snip", "synflow", "fisher", "grasp"])
@pytest.mark.parametrize("identity", [False, True], ids=["trained", "initial"])
def test_proxy_equals_its_definition(proxy: str, identity: bool) -> None:
    model = adapted(identity)
    found = score(proxy, context(model), Scoring())
    expected = getattr(reference, proxy)(base(), pairs(model), batches())
    assert found.keys() == expected.keys()
    for site, value in expected.items():
        assert found[site] == pytest.approx(value, rel=1e-6, abs=1e-12), site
    if proxy in ("snip", "synflow") and identity:
        assert not any(found.values())
    else:
        assert len(set(found.values())) > 1


@pytest.mark.parametrize("proxy", PROXIES)
def test_scoring_again_and_again_keeps_nothing(proxy: str) -> None:
    whole = context(adapted())

    def alive() -> int:
        score(proxy, whole, Scoring())
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    alive()
    assert alive() == alive()


def test_mean_of_norms_is_another_number() -> None:
    model = adapted()
    found = score("grad_norm", context(model), Scoring(mean_of_norms=True))
    expected = reference.mean_of_norms(base(), pairs(model), batches())
    assert found == pytest.approx(expected, rel=1e-6)
    assert found != pytest.approx(score("grad_norm", context(model), Scoring()), rel=1e-3)


def test_synflow_of_the_loss() -> None:
    model = adapted()
    found = score("synflow", context(model), Scoring(synflow="loss"))
    assert found == pytest.approx(reference.synflow(base(), pairs(model), batches(), of="loss"), rel=1e-6)


def test_alpha_test_equals_its_definition_and_says_what_it_costs() -> None:
    model, said = adapted(), []
    whole = context(model)
    object.__setattr__(whole, "say", said.append)
    found = score("alpha_test", whole, Scoring(tolerance=0.002))
    expected = reference.alpha_test(base(), pairs(model), batches(), 0.002)
    assert found == expected
    assert len(set(found.values())) > 1
    assert said == ["alpha_test: up to 99 forward passes, against 3 for a gradient's proxy"]


def test_ab_lora_equals_its_definition() -> None:
    model = adapted()
    whole = context(model)
    found = _importance(whole, {candidate.name: [candidate] for candidate in whole.candidates})
    expected = reference.ab_lora(base(), pairs(model), batches())
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-6)


def test_frozen_weights_can_be_scored() -> None:
    model = adapted(identity=True)
    found = score("snip", context(model), Scoring(of="frozen"))
    weights = {site: (w := torch.eye(1)) for site in found}
    plain = base()
    total = dict.fromkeys(found, 0.0)
    for site in weights:
        plain.get_submodule(site).weight.requires_grad_(True)
    for batch in batches():
        plain(**batch).loss.backward()
    for site in found:
        w = plain.get_submodule(site).weight
        total[site] = float((w.detach() * w.grad).abs().sum())
    assert found == pytest.approx(total, rel=1e-6)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "base_layer" in name)


def test_normalizing_divides_by_the_size() -> None:
    model = adapted()
    plain = score("grad_norm", context(model), Scoring())
    for layer in model.base_model.site_layers():
        size = 3 * (layer.in_features + layer.out_features)
        for how, divisor in (("numel", size), ("sqrt_numel", size**0.5)):
            found = score("grad_norm", context(model), Scoring(normalize=how))
            assert found[layer.site] == pytest.approx(plain[layer.site] / divisor)


@pytest.mark.parametrize("proxy", sorted(PROXIES))
def test_scoring_leaves_everything_as_it_was(proxy: str) -> None:
    model = adapted(identity=True, lora_dropout=0.1)
    first = next(model.base_model.site_layers())
    first.adapter("default").factors.gate[1] = 0
    first.adapter("default").factors.lora_A.grad = torch.ones_like(first.adapter("default").factors.lora_A)
    model.base_model.model.model.layers[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    attention = model.base_model.model.config._attn_implementation
    score(proxy, context(model), Scoring(init="random"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.base_model.model.config._attn_implementation == attention
    gradients = [name for name, p in model.named_parameters() if p.grad is not None]
    assert gradients == [name for name in before if name.endswith("lora_A")][:1]


@pytest.mark.parametrize("proxy", ["snip", "synflow"])
def test_a_proxy_that_sees_nothing_says_so_and_what_to_do(proxy: str) -> None:
    whole = context(adapted(identity=True))
    with pytest.raises(UserError, match=rf"{proxy} gives all 8 sites the score 0.*Take grad_norm, or scoring_init"):
        HeteroLoRA(proxy=proxy).revise(whole)
    for way in ({"scoring_init": "random"}, {"score_target": "frozen"}):
        decided = HeteroLoRA(proxy=proxy, **way).revise(whole)
        assert len(set(decided.scores.values())) > 1
        assert decided.remark == ""


def test_chance_is_named_where_it_decides() -> None:
    decided = HeteroLoRA(proxy="constant").revise(context(adapted()))
    assert decided.remark == "chance decided between 8 sites of equal score"
    assert len(decided.plan.adapted) == 2
    again = HeteroLoRA(proxy="constant").revise(context(adapted()))
    assert decided.plan == again.plan
    others = {
        tuple(HeteroLoRA(proxy="constant").revise(context(adapted(), seed=seed)).plan.adapted) for seed in range(6)
    }
    assert len(others) > 2
