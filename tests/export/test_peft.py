"""Every registered method that is one pair per site goes into a folder of stock PEFT, exactly."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.export.methods import legal_adapters, name

from loraplex import Adapter
from loraplex.adapters.registry import SaveFormat
from loraplex.export.exporting import ExportRequest, export
from loraplex.export.pairs import explicit_targets

pytestmark = pytest.mark.usefixtures("stock_in_process")
ONE_PAIR = [adapter for adapter in legal_adapters() if adapter.peft_format is not SaveFormat.OWN]


def exported(adapter: Path, **order):
    """Export to PEFT; the config and the tensors of what came out."""
    done = export(ExportRequest(str(adapter), "peft", adapter.with_name("out"), **order))
    config = json.loads((done.folder / "adapter_config.json").read_text())
    return done, config, load_file(done.folder / "adapter_model.safetensors")


@pytest.mark.parametrize("adapter", ONE_PAIR, ids=name)
def test_every_method_that_is_one_pair_per_site(make, adapter: Adapter) -> None:
    done, config, tensors = exported(make(adapter=adapter))
    (found,) = done.agreements
    assert found.passed
    assert found.max_difference <= 1e-5 * found.largest_logit
    assert found.same_top1 == 1
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"]
    assert not config["rank_pattern"]
    assert {key.rpartition("lora_")[2] for key in tensors} <= {"A.weight", "B.weight", "magnitude_vector"}


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_stock_adapter_with_other_scales_per_site(make, use_dora: bool) -> None:
    patterns = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 3}}
    adapter = make(stock=True, lora_alpha=5, use_rslora=True, use_dora=use_dora, **patterns)
    done, config, _ = exported(adapter)
    assert done.agreements[0].passed
    assert config["use_dora"] is use_dora
    assert config["use_rslora"] is False
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["rank_pattern"].values()) == {2, 4}


def test_a_checkpoint_with_closed_ranks_leaves_them_out(make) -> None:
    def close(model) -> None:
        model.base_model.close_ranks("default", "model.layers.0.self_attn.q_proj", range(4))
        model.base_model.close_ranks("default", "model.layers.1.mlp.down_proj", [1, 3])

    adapter = make(change=close)
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "LORAPLEX"
    done, config, tensors = exported(adapter)
    assert done.agreements[0].passed
    assert config["rank_pattern"] == {r"^model\.layers\.1\.mlp\.down_proj": 2}
    assert not any("layers.0.self_attn.q_proj" in key for key in tensors)
    assert "model.layers.1.self_attn.q_proj" in config["target_modules"]


def test_what_is_trained_beside_the_sites_comes_along(make) -> None:
    beside = {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5]}
    done, config, tensors = exported(make(target_modules=["q_proj", "down_proj"], **beside))
    assert done.agreements[0].passed
    assert config["modules_to_save"] == ["lm_head"]
    assert any("lm_head" in key for key in tensors)
    assert any("token_adapter" in key for key in tensors)


def test_a_smaller_data_type_is_written_when_asked_for(make) -> None:
    done, _, tensors = exported(make(adapter="dora"), dtype="bfloat16")
    assert {str(tensor.dtype) for key, tensor in tensors.items() if "lora_A" in key} == {"torch.bfloat16"}
    assert {str(tensor.dtype) for key, tensor in tensors.items() if "magnitude" in key} == {"torch.float32"}
    assert done.agreements[0].max_difference > 0


def test_short_names_are_targets_only_where_they_select_just_the_sites() -> None:
    names = ["", "a", "a.q", "a.v", "b", "b.q", "b.v", "x.a.q"]
    assert explicit_targets(["a.q", "b.q", "x.a.q"], names) == (["q"], None)
    assert explicit_targets(["b.q"], names) == (["b.q"], None)
    assert explicit_targets(["a.q", "b.q"], names) == (["a.q", "b.q"], ["x.a.q"])
