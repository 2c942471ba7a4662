"""What inspection says of adapters whose weight change is known."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.tuner.tiny_models import move
from transformers import AutoModelForCausalLM

from loraplex import AdapterConfig, UserError
from loraplex.analysis.inspection import inspect
from loraplex.tuner.layer import SiteLayer


def saved(config: Any, base: Path, folder: Path, change: Any = None) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    move(model, seed=3)
    if change is not None:
        change(model)
    model.save_pretrained(str(folder))
    return folder


PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "target_modules": "all-linear"}


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_stock_adapter_needs_no_base_model(tiny_model: Path, tmp_path: Path, use_dora: bool) -> None:
    config = LoraConfig(r=4, lora_alpha=5, use_rslora=True, use_dora=use_dora, **PATTERNS)
    folder = saved(config, tiny_model, tmp_path)
    found = inspect(str(folder), model="./not-here")
    assert found.method == ("dora" if use_dora else "lora")
    assert len(found.sites) == 14
    assert {site.kind: site.rank for site in found.sites}["q_proj"] == 2
    # against the product that PEFT forms
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)
    for site in found.sites:
        layer: Any = model.get_base_model().get_submodule(site.name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        dense = torch.linalg.svdvals((b @ a * layer.scaling["default"]).double())
        torch.testing.assert_close(torch.tensor(site.spectrum).double(), dense[: site.rank], rtol=1e-4, atol=1e-6)
        assert site.norm == pytest.approx(float(dense.square().sum().sqrt()), rel=1e-4)
        assert (site.magnitude is not None) is use_dora
    assert found.parameters == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert found.exports["merged"] is None
    assert "is not at hand: give --model" in found.exports["gguf"] or use_dora
    assert (found.exports["vllm"] is None) is not use_dora


def test_one_of_our_own_type_is_read_on_its_base(tiny_model: Path, tmp_path: Path) -> None:
    def close(model: PeftModel) -> None:
        tuner: Any = model.base_model
        tuner.close_ranks("default", "model.layers.0.self_attn.q_proj", [0, 2])

    config = AdapterConfig(r=4, lora_alpha=5, target_modules=["q_proj"], task_type="CAUSAL_LM", seed=0)
    found = inspect(str(saved(config, tiny_model, tmp_path, close)))
    assert found.saved_as == "loraplex's own type"
    assert [site.rank for site in found.sites] == [2, 4]
    model = inspect_dense(tmp_path, tiny_model)
    for site in found.sites:
        assert site.norm == pytest.approx(float(model[site.name].norm()), rel=1e-4)
    assert found.exports["peft"] is None


def inspect_dense(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """BA in full, by site."""
    from loraplex import load_adapter

    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), folder)
    return {layer.site: layer.get_delta_weight("default") for layer in model.modules() if isinstance(layer, SiteLayer)}


def test_a_half_that_is_missing(tiny_model: Path, tmp_path: Path) -> None:
    folder = saved(LoraConfig(target_modules=["q_proj"]), tiny_model, tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"without '.*layers\.1\.self_attn\.q_proj\.lora_B\.weight': it is damaged"):
        inspect(str(folder))


def test_a_spectrum_of_nothing(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fresh"
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(folder)
    found = inspect(str(folder))
    assert {(site.norm, site.stable_rank, site.spectrum[0]) for site in found.sites} == {(0.0, 0.0, 0.0)}
    assert found.beside == ["whole modules (lm_head)"]
    assert "whole modules (lm_head)" in str(found.exports["gguf"])
