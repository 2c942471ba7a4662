"""The two ways around PeftModel: transformers' own add_adapter and load_adapter, and PEFT's inject_adapter_in_model."""

import json

import pytest
import torch
from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from tests.tuner.tiny_models import KINDS, build, config, frozen_copy, logits, move, same

import loraplex
from loraplex import UserError

NATIVE = pytest.mark.usefixtures("native_adapters")


@NATIVE
def test_native_adapter_of_transformers_saves_as_plain_lora_and_reloads(tmp_path):
    model = build("llama")
    model.add_adapter(config())
    expected = logits(move(model))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    native = build("llama")
    native.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(native), expected, rtol=0, atol=1e-6)
    assert torch.equal(logits(loraplex.load_adapter(build("llama"), str(tmp_path))), expected)


@NATIVE
def test_native_adapters_beside_each_other():
    model = build("llama")
    model.add_adapter(config())
    expected = logits(move(model))
    model.add_adapter(config(adapter="dora", r=2), adapter_name="second")
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), logits(build("llama")), rtol=0, atol=1e-6)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(build("llama")))


@pytest.mark.parametrize("adapter", KINDS)
def test_state_dict_of_injected_layers_goes_round(adapter):
    model = inject_adapter_in_model(config(adapter=adapter), build("llama"))
    expected = logits(move(model))
    tensors = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    again = inject_adapter_in_model(config(adapter=adapter), build("llama"))
    set_peft_model_state_dict(again, tensors)
    assert torch.equal(logits(again), expected)
    tensors.pop("model.layers.0.self_attn.q_proj.lora_A.weight")
    with pytest.raises(UserError, match="lacks 1 of"):
        set_peft_model_state_dict(again, tensors)


def test_refusals_leave_the_model_alone():
    model = build("llama")
    before = frozen_copy(model)
    for fields, name in (({}, "factors"), ({"target_modules": ["q_prj"]}, "default"), ({"r": 99}, "default")):
        with pytest.raises(UserError):
            inject_adapter_in_model(config(**fields), model, adapter_name=name)
        assert same(model.state_dict(), before)
