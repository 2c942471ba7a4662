"""The folder for engines: right under one global scale, which is all that they read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex import UserError
from loraplex.export.engine import RANKS, engine_rank, read_as_engine
from loraplex.export.exporting import ExportRequest, export
from loraplex.export.verification import pair_logits, read_prompts
from loraplex.models.agreement import model_logits
from loraplex.models.loading import load_model, load_tokenizer
from loraplex.tuner.adapted_model import load_adapted

pytestmark = pytest.mark.usefixtures("stock_in_process")
PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 9}, "alpha_pattern": {"v_proj": 30}}


def test_the_engines_rule_finds_the_adapter_in_the_export_and_not_in_the_original(make, tiny_model: Path) -> None:
    adapter = make(**PATTERNS)
    done = export(ExportRequest(str(adapter), "vllm", adapter.with_name("out")))
    assert [found.reader for found in done.agreements] == ["stock PEFT", "the engines' reading rule"]
    assert all(found.passed and found.tolerance == 1e-5 for found in done.agreements)
    # read as it is, the original is another adapter: this is what the export is for
    rows = read_prompts(load_tokenizer(str(tiny_model)))
    right = model_logits(load_adapted(str(adapter)), rows)
    wrong = pair_logits(load_model(str(tiny_model)), _as_an_engine_would(adapter), rows)
    assert max(float((a - b).abs().max()) for a, b in zip(right, wrong, strict=True)) > 0.05


def _as_an_engine_would(folder: Path):
    """The rule without its refusal of ranks above r."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale, tensors = config["lora_alpha"] / config["r"], load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            a,
            tensors[key.replace("lora_A", "lora_B")] * scale,
        )
        for key, a in tensors.items()
        if "lora_A" in key
    }


def test_one_rank_one_scale_no_patterns_explicit_targets(make) -> None:
    adapter = make(adapter={"name": "lora", "use_rslora": True}, **PATTERNS)
    done = export(ExportRequest(str(adapter), "vllm", adapter.with_name("out")))
    config = json.loads((done.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 16)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert (config["use_rslora"], config["use_dora"], config["bias"]) == (False, False, "none")
    kinds = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert sorted(config["target_modules"]) == kinds
    tensors = load_file(done.folder / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {16}
    assert "padded with zeros to rank 16" in done.notes[0]


@pytest.mark.parametrize("to", ["vllm", "gguf", "peft", "merged"])
def test_an_output_head_of_its_own_is_a_site_like_any_other(make, to: str) -> None:
    adapter = make(target_modules=["lm_head", "q_proj"])
    done = export(ExportRequest(str(adapter), to, adapter.with_name("out")))
    assert all(found.passed for found in done.agreements)
    if to != "merged":
        assert "3 sites" in done.notes[0]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"adapter": "dora"}, "no pair of matrices is equal to it; '--to merged'"),
        ({"modules_to_save": ["lm_head"]}, r"whole modules \(lm_head\)"),
        ({"bias": "all"}, r"biases \(bias='all'\)"),
    ],
)
def test_what_engines_cannot_take_is_refused_with_the_way_out(make, fields, reason: str) -> None:
    adapter = make(**{"target_modules": ["q_proj", "v_proj"], **fields})
    with pytest.raises(UserError, match=reason):
        export(ExportRequest(str(adapter), "vllm", adapter.with_name("out")))
    assert not adapter.with_name("out").exists()


def test_ranks_are_those_of_the_engines() -> None:
    assert [engine_rank(rank) for rank in (1, 8, 9, 64, 65, 257, 512)] == [8, 8, 16, 64, 128, 320, 512]
    assert engine_rank(RANKS[-1] + 1) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 1024}, "refuse rank 1024"),
        ({"r": 2}, "with rank 2, its tensors have 4 and 4"),
    ],
)
def test_the_rule_refuses_what_engines_refuse(make, change, message: str) -> None:
    adapter = make()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        read_as_engine(adapter)


def test_the_rule_refuses_tensors_it_does_not_know(make) -> None:
    adapter = make()
    save_file({"base_model.model.x.lora_magnitude_vector": torch.ones(2)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="engines know no tensor"):
        read_as_engine(adapter)
