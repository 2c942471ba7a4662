"""Several adapters in one model: switching, disabling, deleting, two at once, saving all, names."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.tuner.tiny_models import KINDS, adapted, build, config, logits, move, same, tokens, trainable

import loraplex
from loraplex import UserError
from loraplex.tuner.layer import SiteLayer


def two(**first):
    """`default` is lora on every linear, `other` is dora on three kinds."""
    model = adapted(**first)
    model.add_adapter("other", config(adapter="dora", r=2, target_modules=["q_proj", "o_proj", "down_proj"]))
    model.set_adapter("other")
    move(model, seed=6, scale=0.2)
    model.set_adapter("default")
    return model.eval()


def test_switching_is_bit_exact_both_ways_and_moves_the_gradients():
    model = two()
    first = logits(model)
    names = {"default": set(), "other": set()}
    for adapter in ("other", "default", "other"):
        model.set_adapter(adapter)
        names[adapter] = {name for name, p in model.named_parameters() if p.requires_grad}
        assert names[adapter]
        assert all(f".{adapter}." in name for name in names[adapter])
    assert not torch.allclose(logits(model), first, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_each_alone_equals_a_model_that_has_only_it(tmp_path):
    model = two()
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        model.set_adapter(name)
        single = loraplex.load_adapter(build("llama"), str(folder))
        assert torch.equal(logits(single), logits(model))


@pytest.mark.parametrize("adapter", KINDS)
def test_disabling_gives_the_base_bit_for_bit(adapter):
    model = two(adapter=adapter)
    base = logits(build("llama"))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert not torch.equal(logits(model), base)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), base)
    model.base_model.enable_adapter_layers()
    assert not torch.equal(logits(model), base)


def test_deleting_leaves_the_other_and_forgets_every_tensor():
    model = two()
    expected = logits(model)
    model.delete_adapter("other")
    assert torch.equal(logits(model), expected)
    assert not any("other" in key.split(".") for key in model.state_dict())
    # the active one: another takes its place, here none is left
    model.add_adapter("third", config())
    model.delete_adapter("default")
    assert model.active_adapters == ["third"]
    assert torch.equal(logits(model), logits(build("llama")))


def test_deleted_name_can_be_used_again():
    model = two()
    model.delete_adapter("other")
    model.add_adapter("other", config(r=1, target_modules=["v_proj"]))
    model.set_adapter("other")
    assert sum(p.numel() for p in trainable(model)) == 2 * (32 + 16)


def test_two_at_once_add_their_changes_of_the_frozen_weight():
    model = two()
    model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default", "other"]
    both = logits(model)
    layer = next(m for m in model.modules() if isinstance(m, SiteLayer) and m.site.endswith("layers.1.mlp.down_proj"))
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        change = layer.get_delta_weight("default") + layer.get_delta_weight("other")
        torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ change.T, rtol=0, atol=1e-6)
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"default", "other"}
    model.base_model.set_adapter(["other", "default"])
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-6)


def test_adding_an_adapter_changes_neither_output_nor_gradients_of_the_active_one():
    model = adapted()
    expected, names = logits(model), {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("other", config(adapter="dora", init_lora_weights=False))
    assert torch.equal(logits(model), expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names


def test_own_type_and_plain_lora_beside_each_other(tmp_path):
    """Live gates make `default` loraplex's own type; one save writes each adapter in its form."""
    model = two()
    model.base_model.close_ranks("default", "model.layers.0.mlp.up_proj", [1, 3])
    stock = get_peft_model(build("llama"), LoraConfig(r=3, target_modules=["v_proj", "down_proj"], use_dora=True))
    move(stock)
    stock.save_pretrained(tmp_path / "stock")
    loraplex.load_adapter(model, str(tmp_path / "stock"), "stock")
    expected = {}
    for name in ("default", "other", "stock"):
        model.set_adapter(name)
        expected[name] = logits(model)
    torch.testing.assert_close(expected["stock"], logits(stock), rtol=0, atol=1e-6)

    model.save_pretrained(tmp_path / "all")
    folders = {"default": tmp_path / "all", "other": tmp_path / "all" / "other", "stock": tmp_path / "all" / "stock"}
    types = {n: json.loads((f / "adapter_config.json").read_text())["peft_type"] for n, f in folders.items()}
    assert types == {"default": "LORAPLEX", "other": "LORA", "stock": "LORA"}
    for first in folders:
        again = loraplex.load_adapter(build("llama"), str(folders[first]), first)
        for name in folders:
            if name != first:
                loraplex.load_adapter(again, str(folders[name]), name)
            again.set_adapter(name)
            assert torch.equal(logits(again), expected[name]), (first, name)
            again.set_adapter(first)


def test_loading_beside_keeps_the_active_adapter(tmp_path):
    adapted(adapter="dora").save_pretrained(tmp_path)
    model = adapted(r=2)
    expected = logits(model)
    loraplex.load_adapter(model, str(tmp_path), "second")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), expected)


def test_selected_adapters_are_saved(tmp_path):
    two().save_pretrained(tmp_path, selected_adapters=["other"])
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("README")) == ["other"]


@pytest.mark.parametrize(
    "name",
    [
        *("factors", "combine", "gate", "lora_A", "lora_B", "lora_magnitude_vector", "loraplex_adapters"),
        *("model", "base_model", "layers", "0", "q_proj", "weight", "base_layer", "lm_head"),
        *("modules_to_save", "original_module", "token_adapter", "trainable_tokens_delta"),
        *("", "a.b", "__base__"),
        # attributes of the container that holds the adapters
        *("keys", "train", "half", "forward", "training"),
    ],
)
def test_names_that_cannot_be_told_from_parameter_keys_are_refused(name):
    base = build("llama")
    before = base.state_dict()
    with pytest.raises(UserError, match="choose another") as caught:
        get_peft_model(base, config(), adapter_name=name)
    assert "\n" not in str(caught.value)
    assert same(base.state_dict(), before)
    model = adapted()
    before = model.state_dict()
    with pytest.raises(UserError, match="choose another"):
        model.add_adapter(name, config())
    assert same(model.state_dict(), before)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["A", "lora", "défaut", "my adapter", "default2", "base", "B-1"])
def test_other_names_keep_every_tensor(name, tmp_path):
    model = adapted()
    with warnings.catch_warnings():
        # PEFT warns of a name that is part of our prefix; the keys below show that it need not
        warnings.filterwarnings("ignore", message=".*should not be contained in the prefix")
        model.add_adapter(name, config(adapter="dora"))
    model.set_adapter(name)
    move(model, seed=8)
    model.save_pretrained(tmp_path)
    for adapter, folder in (("default", tmp_path), (name, tmp_path / name)):
        model.set_adapter(adapter)
        assert torch.equal(logits(loraplex.load_adapter(build("llama"), str(folder))), logits(model))


def test_peft_reports_the_state_of_the_model():
    model = two()
    status = model.get_model_status()
    assert status.available_adapters == ["default", "other"]
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True, "other": False}
    assert status.num_adapter_layers == 14
    assert status.trainable_params == sum(p.numel() for p in trainable(model))
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    layers = model.get_layer_status()
    assert {layer.module_type for layer in layers} == {"loraplex_adapters"} or len(layers) == 14


def test_from_pretrained_and_peft_load_adapter_accept_a_second_own_type(tmp_path):
    model = two()
    model.base_model.close_ranks("default", "model.layers.0.mlp.up_proj", [0])
    model.base_model.close_ranks("other", "model.layers.1.mlp.down_proj", [1])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(logits(again), logits(model))


def test_rows_of_a_long_batch_keep_their_own_adapter_after_switching():
    """Switching must not leave hooks behind: a batch after a mixed one is computed by the active adapter alone."""
    model = two()
    expected = logits(model, tokens(3))
    logits(model, tokens(3), adapter_names=["other", "__base__", "default"])
    assert torch.equal(logits(model, tokens(3)), expected)
