"""LoRA and DoRA on Llama-, Qwen-, GPT-2- and BERT-shaped models: start, training, merging, stock PEFT."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.tuner.tiny_models import ARCHITECTURES, KINDS, adapted, build, config, frozen_copy, logits, tokens, trainable

from loraplex.adapters.registry import SaveFormat
from loraplex.tuner.layer import SiteLayer

EVERY = [pytest.mark.parametrize("architecture", ARCHITECTURES), pytest.mark.parametrize("adapter", KINDS)]
SITES = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "bert": {"query", "key", "value", "dense"},
}


def every(function):
    for mark in EVERY:
        function = mark(function)
    return function


def losses(model, steps=12):
    """Train on one fixed batch with Adam; return the losses."""
    model.train()
    ids = tokens(4)
    labels = torch.tensor([0, 1, 2, 1]) if hasattr(model.config, "num_labels") and model.config.num_labels == 3 else ids
    optimizer = torch.optim.Adam(trainable(model), lr=1e-2)
    values = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    model.eval()
    return values


@every
def test_starts_as_the_base_model_on_every_site(architecture, adapter):
    base = build(architecture)
    expected = logits(base)
    model = adapted(architecture, adapter=adapter, moved=False)
    assert torch.equal(logits(model), expected)
    layers = [module for module in model.modules() if isinstance(module, SiteLayer)]
    assert {layer.site.rsplit(".", 1)[-1] for layer in layers} == SITES[architecture]
    shapes = {(layer.in_features, layer.out_features) for layer in layers}
    # grouped queries, a fused projection, the feed-forward
    assert shapes >= {
        "llama": {(32, 16), (32, 48)},
        "qwen2": {(32, 16), (32, 48)},
        "gpt2": {(32, 96), (48, 32)},
        "bert": {(32, 48)},
    }[architecture]  # fmt: skip


@every
def test_default_target_modules_are_those_of_peft(architecture, adapter):
    model = adapted(architecture, adapter=adapter, target_modules=None)
    kinds = {m.site.rsplit(".", 1)[-1] for m in model.modules() if isinstance(m, SiteLayer)}
    assert kinds == {
        "llama": {"q_proj", "v_proj"},
        "qwen2": {"q_proj", "v_proj"},
        "gpt2": {"c_attn"},
        "bert": {"query", "value"},
    }[architecture]  # fmt: skip


@every
def test_training_moves_the_adapter_and_nothing_else(architecture, adapter):
    model = adapted(architecture, adapter=adapter, moved=False)
    before = frozen_copy(model)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    values = losses(model)
    assert values[-1] < 0.98 * values[0]
    after = model.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == names
    endings = {name.rsplit(".", 1)[-1] for name in names if "loraplex_adapters" in name}
    assert endings == {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if adapter == "dora" else set())


@every
def test_trained_adapter_saves_as_plain_lora_and_equals_stock_peft(architecture, adapter, tmp_path):
    model = adapted(architecture, adapter=adapter, moved=False)
    losses(model)
    assert model.peft_config["default"].save_format is (SaveFormat.DORA if adapter == "dora" else SaveFormat.LORA)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(build(architecture), tmp_path)
    assert type(stock.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=2e-6)


@every
def test_merged_model_computes_the_same(architecture, adapter):
    model = adapted(architecture, adapter=adapter)
    expected = logits(model)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not any(isinstance(module, SiteLayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=2e-6)
    assert (expected - logits(build(architecture))).abs().max() > 1e-2


@pytest.mark.parametrize("adapter", KINDS)
def test_classification_head_trains_is_saved_and_reloads_in_stock_peft(adapter, tmp_path):
    model = get_peft_model(build("bert"), config("bert", adapter=adapter))
    base_head = build("bert").classifier.weight
    losses(model)
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    assert not torch.equal(head, base_head)
    assert torch.equal(model.base_model.model.classifier.original_module.weight, base_head)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert torch.equal(stock.base_model.model.classifier.modules_to_save["default"].weight, head)
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-6)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build("bert")))
