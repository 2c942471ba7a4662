"""PiSSA: the trained pair is the paper's, the base stays as it is, and plain LoRA of twice the rank says the same."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.tuner.tiny_models import adapted, build, config, logits, same, trainable

import loraplex
from loraplex import UserError
from loraplex.tuner.peft_format import save_peft_format

PISSA = {"name": "lora", "init": "pissa"}


def test_starts_at_the_singular_vectors_and_leaves_the_base_alone():
    model = adapted(adapter=PISSA, moved=False)
    assert torch.equal(logits(model), logits(build("llama")))
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    factors = layer.loraplex_adapters["default"].factors
    u, s, vh = torch.linalg.svd(layer.base_layer.weight.detach(), full_matrices=False)
    expected = u[:, :4] @ s[:4].diag() @ vh[:4]
    with torch.no_grad():
        torch.testing.assert_close(factors.scale * factors.lora_B @ factors.lora_A, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(factors.lora_A.norm(dim=1), factors.lora_B.norm(dim=0), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build("llama")))
    assert sum(p.numel() for p in trainable(model)) == sum(p.numel() for p in trainable(adapted()))


def test_trains_as_peft_does_with_the_same_start():
    """PEFT puts W0 − s·B0 A0 in the place of W0: the same function of the same trained pair."""
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["up_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    stock = get_peft_model(build("llama"), lora)
    ours = adapted(adapter=PISSA, target_modules=["up_proj"], moved=False)
    torch.manual_seed(4)
    for i in (0, 1):
        theirs = stock.get_submodule(f"base_model.model.model.layers.{i}.mlp.up_proj")
        mine = ours.get_submodule(f"base_model.model.model.layers.{i}.mlp.up_proj").loraplex_adapters["default"].factors
        with torch.no_grad():
            a, b = 0.1 * torch.randn_like(mine.lora_A), 0.1 * torch.randn_like(mine.lora_B)
            mine.lora_A += a
            mine.lora_B += b
            theirs.lora_A["default"].weight.copy_(mine.lora_A)
            theirs.lora_B["default"].weight.copy_(mine.lora_B)
    torch.testing.assert_close(logits(ours), logits(stock.eval()), rtol=0, atol=2e-5)


def test_file_and_plain_lora_of_twice_the_rank(tmp_path):
    model = adapted(adapter=PISSA)
    model.save_pretrained(tmp_path / "own")
    again = loraplex.load_adapter(build("llama"), str(tmp_path / "own"))
    assert same(again.state_dict(), model.state_dict())
    assert torch.equal(logits(again), logits(model))
    save_peft_format(model, tmp_path / "plain")
    stock = PeftModel.from_pretrained(build("llama"), tmp_path / "plain")
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-5)
    assert {value.shape[0] for key, value in load_file(tmp_path / "plain" / "adapter_model.safetensors").items()
            if ".lora_A." in key} == {8}  # fmt: skip


def test_goes_with_magnitude_and_with_rslora():
    for adapter in ({"name": "dora", "init": "pissa"}, {**PISSA, "use_rslora": True}):
        assert torch.equal(logits(adapted(adapter=adapter, moved=False)), logits(build("llama")))


def test_refused_where_it_makes_no_sense():
    with pytest.raises(UserError, match="unknown adapter option 'init' for factors 'xs'"):
        config(adapter={"name": "lora-xs", "init": "pissa"})
    with pytest.raises(UserError, match=r"init is 'pisa'.*Did you mean 'pissa'"):
        config(adapter={"name": "lora", "init": "pisa"})
    with pytest.raises(UserError, match="k_proj is 20, but this site allows at most 16"):
        get_peft_model(build("llama"), config(adapter=PISSA, r=20))
