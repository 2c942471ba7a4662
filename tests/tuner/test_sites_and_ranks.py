"""What is adapted, with which rank: targets that match nothing, ranks out of range, and no half-added adapter."""

import pytest
import torch
from peft import get_peft_model
from tests.tuner.tiny_models import adapted, build, config, frozen_copy, logits, same
from torch import nn

from loraplex import AdapterConfig, UserError
from loraplex.tuner.layer import SiteLayer
from loraplex.tuner.sites import find_sites


def sites(model):
    return {m.site: m.adapter("default").factors.rank for m in model.modules() if isinstance(m, SiteLayer)}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_prj"]}, "'q_prj' not found in the base model.*Did you mean 'q_proj'"),
        ({"target_modules": ["q_proj", "upp_proj"]}, "'upp_proj' not found.*Did you mean 'up_proj'"),
        ({"target_modules": r".*\.q_prj"}, r"'\.\*\\\\\.q_prj' .* match no linear module"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "match no linear module"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, "match no linear module"),
        ({"target_modules": []}, "match no linear module"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is a Embedding: loraplex adapts Linear and Conv1D"),
        ({"target_modules": ["self_attn"]}, "self_attn is a LlamaAttention"),
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern 'q_prj' matches no adapted module. Did you mean 'q_proj'"),
        ({"alpha_pattern": {"vproj": 2}}, "alpha_pattern 'vproj' matches no adapted module. Did you mean 'v_proj'"),
        ({"rank_pattern": {"k_proj": 33}}, r"rank of model\.layers\.0\.self_attn\.k_proj is 33, .* at most 32: lower"),
        ({"rank_pattern": {r"layers\.1\.mlp\.down_proj": 49}}, r"rank of model\.layers\.1\.mlp\.down_proj is 49"),
        ({"r": 64}, r"rank of model\.layers\.0\.self_attn\.q_proj is 64, but this site allows at most 32"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, "layers_to_transform 2 matches no"),
        ({"exclude_modules": ["layers.1.mpl"]}, "exclude_modules 'layers.1.mpl' matches no module"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save 'lm_haed' .*Did you mean 'lm_head'"),
    ],
    ids=lambda value: next(iter(value.items()))[0] if isinstance(value, dict) else "",
)
def test_refused_before_anything_is_changed(fields, expected):
    base = build("llama")
    before = frozen_copy(base)
    with pytest.raises(UserError, match=expected) as caught:
        get_peft_model(base, config(**fields))
    assert "\n" not in str(caught.value)
    assert same(base.state_dict(), before)
    assert all(parameter.requires_grad for parameter in base.parameters())

    model = adapted(target_modules=["v_proj"])
    before, output = frozen_copy(model), logits(model)
    with pytest.raises(UserError, match=expected):
        model.add_adapter("second", config(**fields))
    assert same(model.state_dict(), before)
    assert torch.equal(logits(model), output)
    assert list(model.peft_config) == ["default"]
    # the name is free: a right one can follow
    model.add_adapter("second", config())
    model.set_adapter("second")


@pytest.mark.parametrize("rank", [0, -1, 2.5, "8", True, None])
def test_rank_that_is_not_a_whole_positive_number(rank):
    with pytest.raises(UserError, match=r"rank of the adapter \(r\) is .*at least 1"):
        config(r=rank)
    with pytest.raises(UserError, match=r"rank of 'q_proj' \(rank_pattern\) is .*at least 1"):
        config(rank_pattern={"q_proj": rank})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lora_alpha": 0}, "alpha of 'lora_alpha' is 0"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha of 'q_proj' is -1"),
        ({"lora_alpha": float("nan")}, "alpha of 'lora_alpha' is nan"),
        ({"lora_alpha": float("inf")}, "alpha of 'lora_alpha' is inf"),
        ({"lora_dropout": 1}, "lora_dropout is 1"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
        ({"target_modules": "(q_proj"}, r"target_modules: '\(q_proj' is not a regular expression"),
        ({"exclude_modules": "*"}, "exclude_modules: '\\*' is not a regular expression"),
        ({"rank_pattern": {"q_proj[": 2}}, r"rank_pattern: 'q_proj\[' is not a regular expression"),
        ({"target_modules": [1, 2]}, "target_modules is {1, 2}: give a list of module names"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"layers_pattern": "layers"}, "layers_pattern is given without layers_to_transform"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, "layers_to_transform needs target_modules as a list"),
        ({"adapter": "dorra"}, "unknown adapter 'dorra'.*Did you mean 'dora'"),
        ({"adapter": {"name": "lora", "use_rslra": True}}, "unknown adapter option 'use_rslra'.*'use_rslora'"),
        ({"allocation": "unform"}, "unknown allocation 'unform'.*Did you mean 'uniform'"),
        ({"objective": "plane"}, "unknown objective 'plane'.*Did you mean 'plain'"),
    ],
)
def test_values_out_of_range(fields, expected):
    with pytest.raises(UserError, match=expected) as caught:
        config(**fields)
    assert "\n" not in str(caught.value)


def test_sites_are_those_that_are_adapted():
    fields = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {r"layers\.1\.mlp\.down_proj": 9}}
    found = find_sites(build("llama"), config(**fields))
    assert {site.name for site in found} == set(sites(adapted(**fields)))
    assert [site.layer for site in found] == [0, 0, 1, 1]
    assert {site.kind for site in found} == {"q_proj", "down_proj"}
    assert sites(adapted(**fields))["model.layers.1.mlp.down_proj"] == 9
    # a model that carries adapters already has the same sites
    assert find_sites(adapted(target_modules=["v_proj"]).get_base_model(), config(**fields)) == found


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_all_linear_of_a_second_adapter_is_that_of_the_first(architecture):
    model = adapted(architecture)
    model.add_adapter("second", config(architecture))
    first, second = (
        {m.site for m in model.modules() if isinstance(m, SiteLayer) and name in m.loraplex_adapters}
        for name in ("default", "second")
    )
    assert first == second
    assert not any("lm_head" in name or "classifier" in name for name in second)


def test_rank_may_exceed_the_shorter_side():
    model = adapted(target_modules=["k_proj"], r=20)
    assert set(sites(model).values()) == {20}
    assert model.merge_and_unload() is not None


def test_attention_that_reads_the_weight_past_its_module_is_refused():
    """torch's MultiheadAttention never calls its out_proj: an adapter there would train nothing."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(UserError, match=r"out_proj is a NonDynamicallyQuantizableLinear"):
        get_peft_model(model, AdapterConfig(r=2, target_modules=["out_proj", "linear1"]))


def test_same_seed_same_start_whatever_else_is_adapted():
    def start(**fields):
        model = adapted(moved=False, **fields)
        return model.state_dict()[
            "base_model.model.model.layers.1.self_attn.q_proj.loraplex_adapters.default.factors.lora_A"
        ]

    assert torch.equal(start(), start(target_modules=["q_proj"]))
    assert not torch.equal(start(), start(seed=4))
    torch.manual_seed(0)
    first = start(seed=None)
    torch.manual_seed(0)
    assert torch.equal(first, start(seed=None))
    assert not torch.equal(first, start(seed=None))
