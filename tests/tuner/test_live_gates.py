"""Closed ranks: resumed exactly while live, plain LoRA of the ranks that are left once finished."""

import copy
import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.tuner.tiny_models import KINDS, adapted, build, config, logits, move, same

import loraplex
from loraplex import AdapterConfig, UserError
from loraplex.tuner.layer import SiteLayer

Q0, DOWN1, UP0 = (f"model.layers.{name}" for name in ("0.self_attn.q_proj", "1.mlp.down_proj", "0.mlp.up_proj"))
EVERY = pytest.mark.parametrize("adapter", KINDS)


def closed(**fields):
    """One site with one rank of four left, one with none."""
    model = adapted(alpha_pattern={"v_proj": 2.5}, rank_pattern={"up_proj": 3}, **fields)
    model.base_model.close_ranks("default", Q0, [0, 1, 3])
    model.base_model.close_ranks("default", DOWN1, [0, 1, 2, 3])
    return model


def site(model, name):
    return next(m for m in model.modules() if isinstance(m, SiteLayer) and m.site == name)


@EVERY
def test_closing_takes_a_ranks_part_out_at_once(adapter):
    model = adapted(adapter=adapter)
    factors = site(model, Q0).adapter("default").factors
    a, b = (tensor.detach() for tensor in factors.pair())
    model.base_model.close_ranks("default", Q0, [1])
    left = [0, 2, 3]
    torch.testing.assert_close(factors.pair()[1] @ a, b[:, left] @ a[left])
    assert factors.lora_A.shape == (4, 32)
    assert factors.open_ranks == 3
    model.base_model.close_ranks("default", Q0, left)
    assert torch.equal(site(model, Q0).get_delta_weight("default"), torch.zeros(32, 32))


@EVERY
def test_site_without_open_ranks_is_the_frozen_one_bit_for_bit(adapter):
    model = adapted(adapter=adapter)
    layer = site(model, UP0)
    model.base_model.close_ranks("default", UP0, [0, 1, 2, 3])
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(layer(x), layer.base_layer(x))


@EVERY
def test_closed_ranks_get_no_gradient_through_b(adapter):
    model = closed(adapter=adapter).train()
    logits_sum = model(input_ids=torch.tensor([[3, 4, 5]])).logits.square().sum()
    logits_sum.backward()
    factors = site(model, Q0).adapter("default").factors
    assert torch.count_nonzero(factors.lora_B.grad[:, [0, 1, 3]]) == 0
    assert torch.count_nonzero(factors.lora_A.grad[[0, 1, 3]]) == 0
    assert torch.count_nonzero(factors.lora_A.grad[2]) > 0


@EVERY
def test_live_checkpoint_is_our_own_type_and_resumes_with_its_gates(adapter, tmp_path):
    model = closed(adapter=adapter)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORAPLEX"
    assert any(key.endswith(".gate") for key in load_file(tmp_path / "adapter_model.safetensors"))
    for again in (
        PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True),
        loraplex.load_adapter(build("llama"), str(tmp_path), is_trainable=True),
        PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True, low_cpu_mem_usage=True),
    ):
        assert type(again.base_model).__name__ == "LoraplexTuner"
        assert same(again.state_dict(), model.state_dict())
        torch.testing.assert_close(logits(again.eval()), logits(model), rtol=0, atol=1e-6)


@EVERY
def test_resumed_checkpoint_is_saved_live_again(adapter, tmp_path):
    """A loaded gate must not be forgotten at the next save: the closed ranks would come back."""
    model = closed(adapter=adapter)
    model.save_pretrained(tmp_path / "first")
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "first", is_trainable=True)
    again.save_pretrained(tmp_path / "second")
    assert same(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second")))
    third = adapted(adapter=adapter, alpha_pattern={"v_proj": 2.5}, rank_pattern={"up_proj": 3})
    third.load_adapter(tmp_path / "second", "default")
    third.save_pretrained(tmp_path / "third")
    assert same(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "third")))
    assert torch.equal(logits(third), logits(model))


@EVERY
def test_going_back_to_a_checkpoint_without_gates_opens_them(adapter, tmp_path):
    model = adapted(adapter=adapter)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    model.base_model.close_ranks("default", Q0, [0, 1])
    assert not torch.equal(logits(model), expected)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), expected)
    assert site(model, Q0).adapter("default").factors.open_ranks == 4
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_without_loraplex_a_live_checkpoint_fails_loudly(tmp_path, stock_python):
    closed().save_pretrained(tmp_path)
    torch.save(build("llama"), tmp_path / "base.pt")
    code = (
        "import sys, torch; from peft import PeftModel\n"
        "base = torch.load(sys.argv[1] + '/base.pt', weights_only=False)\n"
        "PeftModel.from_pretrained(base, sys.argv[1])"
    )
    done = stock_python.run("-c", code, str(tmp_path))
    assert done.returncode != 0
    assert "LORAPLEX" in done.stderr.splitlines()[-1]


@EVERY
def test_finished_adapter_is_plain_lora_of_the_ranks_that_are_left(adapter, tmp_path):
    model = closed(adapter=adapter)
    expected = logits(model)
    ranks = model.base_model.finish("default")
    assert (ranks[Q0], ranks[DOWN1], ranks[UP0]) == (1, 0, 3)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)

    written = LoraConfig.from_pretrained(tmp_path)
    assert written.rank_pattern[f"^{re.escape(Q0)}"] == 1
    assert written.rank_pattern == written.alpha_pattern
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert file[f"base_model.model.{Q0}.lora_A.weight"].shape == (1, 32)
    assert not any(DOWN1 in key or "gate" in key.rsplit(".", 2)[-2:] for key in file)
    for again in (
        PeftModel.from_pretrained(build("llama"), tmp_path),
        loraplex.load_adapter(build("llama"), str(tmp_path)),
    ):
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)


@EVERY
def test_finished_adapter_trains_on_and_is_finished_again(adapter, tmp_path):
    model = closed(adapter=adapter)
    model.base_model.finish("default")
    model.base_model.close_ranks("default", UP0, [2])
    assert model.base_model.finish("default")[UP0] == 2
    move(model, seed=31)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)


def test_finished_ranks_with_rslora_keep_the_scale_of_each_site(tmp_path):
    """alpha/√r of the configured rank, whatever rank is left."""
    model = closed(adapter={"name": "lora", "use_rslora": True})
    expected = logits(model)
    model.base_model.finish("default")
    model.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).use_rslora is False
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)


def test_site_left_out_does_not_come_back_through_another_sites_name(tmp_path):
    """Full names are matched as suffixes by PEFT: 'proj' would adapt 'block.proj' too."""
    base = torch.nn.Sequential()
    base.add_module("proj", torch.nn.Linear(6, 6))
    base.add_module("block", torch.nn.Sequential())
    base.block.add_module("proj", torch.nn.Linear(6, 6))
    base.block.add_module("other", torch.nn.Linear(6, 6))
    for targets, rest in ((["proj"], None), (r"proj|block\.other", "untouched")):
        model = get_peft_model(copy.deepcopy(base), AdapterConfig(r=2, target_modules=targets, seed=1))
        move(model)
        if rest is None:
            model.base_model.close_ranks("default", "block.proj", [0, 1])
        model.base_model.finish("default")
        model.save_pretrained(tmp_path)
        x = torch.randn(3, 6)
        for again in (
            PeftModel.from_pretrained(copy.deepcopy(base), tmp_path),
            loraplex.load_adapter(copy.deepcopy(base), str(tmp_path)),
        ):
            torch.testing.assert_close(again(x), model(x), rtol=0, atol=1e-6)


def test_finished_with_exclusions_and_layers(tmp_path):
    fields = {"exclude_modules": ["layers.0.self_attn.v_proj"], "target_modules": ["q_proj", "v_proj"]}
    model = adapted(**fields, layers_to_transform=[0, 1])
    model.base_model.close_ranks("default", Q0, [3])
    model.base_model.finish("default")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    assert len([k for k in load_file(tmp_path / "adapter_model.safetensors") if "lora_A" in k]) == 3


def test_closing_what_is_not_there_is_refused():
    model = adapted()
    tuner = model.base_model
    with pytest.raises(UserError, match="no adapter 'other': there are default"):
        tuner.close_ranks("other", Q0, [0])
    with pytest.raises(UserError, match=r"has no site 'model\.layers\.0\.self_attn\.q_prj'.*Did you mean"):
        tuner.close_ranks("default", "model.layers.0.self_attn.q_prj", [0])
    for ranks in ([4], [-1], [0, 9]):
        with pytest.raises(UserError, match=rf"{re.escape(Q0)} has ranks 0 to 3, not"):
            tuner.close_ranks("default", Q0, ranks)
    assert site(model, Q0).adapter("default").factors.open_ranks == 4
    assert not model.peft_config["default"].state.live
    for layer in tuner.site_layers():
        tuner.close_ranks("default", layer.site, range(4))
    with pytest.raises(UserError, match="no open rank left: there is nothing to save"):
        tuner.finish("default")


def test_a_second_adapter_keeps_its_own_gates(tmp_path):
    model = closed()
    model.add_adapter("other", config(adapter="dora"))
    model.set_adapter("other")
    move(model, seed=12)
    expected = logits(model)
    assert site(model, Q0).adapter("other").factors.open_ranks == 4
    model.base_model.finish("default")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "other")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)


@EVERY
def test_merged_with_closed_ranks(adapter):
    model = closed(adapter=adapter)
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-6)
    assert torch.equal(merged.get_submodule(DOWN1).weight, build("llama").get_submodule(DOWN1).weight)
