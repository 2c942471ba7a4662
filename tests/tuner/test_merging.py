"""Writing adapters into the frozen weight and taking them out again, one and several, safely."""

import copy
import itertools
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from tests.tuner.tiny_models import ARCHITECTURES, KINDS, adapted, build, config, frozen_copy, logits, move, same
from torch import nn

from loraplex import AdapterConfig, UserError
from loraplex.tuner.layer import SiteLayer


def several(architecture="llama", kinds=("lora", "dora")):
    """Adapters of these kinds on the same sites, all active."""
    model = adapted(architecture, adapter=kinds[0])
    names = ["default"]
    for index, kind in enumerate(kinds[1:]):
        names.append(f"more{index}")
        model.add_adapter(names[-1], config(architecture, adapter=kind, r=2 + index))
        model.set_adapter(names[-1])
        move(model, seed=20 + index)
    model.base_model.set_adapter(names)
    return model.eval(), names


def weights(model):
    return {m.site: m.base_layer.weight.detach().clone() for m in model.modules() if isinstance(m, SiteLayer)}


# not bert: PEFT allows one active adapter where a classification head is saved with it
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_lora_and_dora_merged_together_equal_the_two_active_together(architecture):
    model, _ = several(architecture)
    expected, before = logits(model), weights(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-6)
    assert not any(torch.equal(weight, before[site]) for site, weight in weights(model).items())
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    assert same(weights(model), before)


def test_every_order_of_merging_gives_the_same():
    """Each change is taken against W0: PEFT would merge DoRA on top of what was merged before."""
    model, names = several(kinds=("dora", "lora", "dora"))
    expected = logits(model)
    found = []
    for order in itertools.permutations(names):
        for name in order:
            model.merge_adapter([name])
        found.append(logits(model))
        torch.testing.assert_close(found[-1], expected, rtol=0, atol=2e-6)
        model.unmerge_adapter()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=2e-6)


def test_merging_one_of_two_equals_that_one_alone():
    model, names = several()
    model.base_model.set_adapter(names[1])
    expected = logits(model)
    model.base_model.set_adapter(names)
    model.merge_adapter([names[1]])
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-6)
    assert model.get_model_status().merged_adapters == [names[1]]
    # a second time is refused by PEFT with a warning and changes nothing
    merged = weights(model)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        model.merge_adapter([names[1]])
    assert same(weights(model), merged)


@pytest.mark.parametrize("adapter", KINDS)
def test_merging_again_and_again_does_not_drift(adapter):
    model = adapted(adapter=adapter)
    expected, before = logits(model), weights(model)
    for _ in range(5):
        model.merge_adapter()
        model.unmerge_adapter()
    assert same(weights(model), before)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("adapter", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite_and_leaves_every_weight(adapter, value):
    model = adapted(adapter=adapter)
    before = frozen_copy(model)
    layers = [m for m in model.modules() if isinstance(m, SiteLayer)]
    with torch.no_grad():
        # the last site: the others come before it
        layers[-1].adapter("default").factors.lora_B[0, 0] = value
    base = weights(model)
    with pytest.raises(UserError, match=r"NaNs detected in the merged weights.*layers\.1\.mlp\.down_proj") as caught:
        model.merge_adapter(safe_merge=True)
    assert "\n" not in str(caught.value)
    assert same(weights(model), base)
    assert not any(layer.merged for layer in layers)
    with pytest.raises(UserError, match="NaNs detected"):
        copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize("adapter", KINDS)
def test_safe_merge_of_finite_numbers_is_the_plain_one(adapter):
    model = adapted(adapter=adapter)
    safe, plain = (copy.deepcopy(model).merge_and_unload(safe_merge=flag) for flag in (True, False))
    assert same(safe.state_dict(), plain.state_dict())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("adapter", KINDS)
def test_unloading_gives_back_the_base_model(architecture, adapter):
    base = build(architecture)
    before, expected = frozen_copy(base), logits(base)
    model = adapted(architecture, adapter=adapter)
    model.merge_adapter()
    restored = model.unload()
    assert type(restored) is type(base)
    if architecture == "bert":
        # PEFT hands over the trained head
        restored.classifier = build("bert").classifier
    assert same(restored.state_dict(), before)
    assert torch.equal(logits(restored), expected)
    assert not hasattr(restored, "peft_config")
    assert not any(isinstance(module, SiteLayer) for module in restored.modules())


def test_merged_model_is_saved_and_read_as_a_plain_one(tmp_path):
    model = adapted(adapter="dora")
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    again = type(build("llama")).from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=2e-6)


def test_merged_weight_keeps_shape_dtype_layout_and_identity():
    for architecture, dtype in (("gpt2", torch.float32), ("llama", torch.bfloat16)):
        model = get_peft_model(build(architecture).to(dtype), config(architecture, adapter="dora"))
        move(model)
        parameters = {m.site: m.base_layer.weight for m in model.modules() if isinstance(m, SiteLayer)}
        before = {site: (p.shape, p.stride(), p.dtype) for site, p in parameters.items()}
        model.merge_adapter()
        for module in model.modules():
            if isinstance(module, SiteLayer):
                weight = module.base_layer.weight
                assert weight is parameters[module.site]
                assert (weight.shape, weight.stride(), weight.dtype) == before[module.site]
                assert not weight.requires_grad


def test_bfloat16_merge_rounds_the_sum_once():
    """W0 + ΔW is formed in float32, not added up in bfloat16."""
    model = move(get_peft_model(build("llama").to(torch.bfloat16), config(adapter="dora")))
    layer = next(m for m in model.modules() if isinstance(m, SiteLayer))
    w0 = layer.base_layer.weight.detach().float()
    change = layer.get_delta_weight("default")
    assert change.dtype is torch.float32
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, (w0 + change).to(torch.bfloat16))


@pytest.mark.parametrize("adapter", KINDS)
def test_deleting_switching_and_disabling_while_merged(adapter):
    model, names = several(kinds=(adapter, "lora"))
    base = logits(build("llama"))
    model.merge_adapter([names[0]])
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter(names[0])
    merged = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert not torch.equal(merged, base)


def test_change_of_a_conv1d_has_the_layout_of_its_weight():
    model = adapted("gpt2", adapter="dora")
    layer = next(m for m in model.modules() if isinstance(m, SiteLayer) and m.site.endswith("c_attn"))
    assert layer.get_delta_weight("default").shape == layer.base_layer.weight.shape == (32, 96)


def test_both_kinds_equal_peft_on_a_merged_base_they_share(tmp_path):
    """Merged by us and merged by PEFT are the same weights."""
    for adapter in KINDS:
        model = adapted(adapter=adapter)
        model.save_pretrained(tmp_path / adapter)
        stock = PeftModel.from_pretrained(build("llama"), tmp_path / adapter).merge_and_unload()
        ours = model.merge_and_unload().state_dict()
        for key, value in stock.state_dict().items():
            torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-6, msg=key)


def test_conversion_of_a_model_to_lora_by_peft_reads_our_change():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), AdapterConfig(r=2, lora_alpha=3, target_modules=["0"]))
    move(model)
    lora_config, tensors = convert_to_lora(model, rank=2)
    assert isinstance(lora_config, LoraConfig)
    a, b = (next(v for k, v in tensors.items() if f"lora_{part}" in k) for part in "AB")
    layer = model.base_model.model[0]
    torch.testing.assert_close(b @ a, layer.get_delta_weight("default"), rtol=0, atol=1e-5)
