"""The whole model: merged in float32, cast once, and refused where the weights cannot hold the adapter."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.methods import legal_adapters, name
from tests.tuner.tiny_models import gpt2
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from loraplex import Adapter, UserError
from loraplex.export.exporting import ExportRequest, export
from loraplex.export.merged import refuse_shared, rounding_losses
from loraplex.tuner.adapted_model import load_adapted

MERGEABLE = [adapter for adapter in legal_adapters() if adapter.mergeable]


@pytest.mark.parametrize("adapter", MERGEABLE, ids=name)
def test_merged_equals_unmerged_in_float32(make, adapter: Adapter) -> None:
    folder = make(adapter=adapter)
    done = export(ExportRequest(str(folder), "merged", folder.with_name("out")))
    (found,) = done.agreements
    assert found.passed
    assert found.tolerance == 1e-5
    assert found.same_top1 == 1
    # a model like any other, with its tokenizer
    assert AutoModelForCausalLM.from_pretrained(done.folder).dtype == torch.float32
    assert AutoTokenizer.from_pretrained(done.folder)("the cat")["input_ids"]
    assert not (done.folder / "adapter_config.json").exists()


def test_what_is_trained_beside_the_sites_is_merged_too(make) -> None:
    folder = make(target_modules=["q_proj"], modules_to_save=["lm_head"], bias="all")
    assert export(ExportRequest(str(folder), "merged", folder.with_name("out"))).agreements[0].passed


def test_trained_rows_of_the_embedding_are_merged_too(make, tiny_model: Path) -> None:
    folder = make(target_modules=["q_proj"], trainable_token_indices=[3, 5])
    done = export(ExportRequest(str(folder), "merged", folder.with_name("out")))
    assert done.agreements[0].passed
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().weight for path in (tiny_model, done.folder)
    )
    assert (before != after).any(dim=1).nonzero().flatten().tolist() == [3, 5]


def test_every_data_type_says_what_it_loses(make) -> None:
    folder = make()
    losses = rounding_losses(load_adapted(str(folder), dtype="float32"))
    assert losses[torch.float32] == 0
    assert 0 < losses[torch.float16] < losses[torch.bfloat16] < 0.05
    done = export(ExportRequest(str(folder), "merged", folder.with_name("out"), dtype="bfloat16"))
    assert f"bfloat16 {losses[torch.bfloat16]:.2g} (written)" in done.notes[0]
    assert AutoConfig.from_pretrained(done.folder).dtype == torch.bfloat16
    assert done.agreements[0].max_difference > 1e-4


def test_above_the_tolerance_nothing_is_put_in_place(make) -> None:
    folder = make()
    out = folder.with_name("out")
    with pytest.raises(UserError, match=r"says transformers: a logit differs by .* nothing was put in place"):
        export(ExportRequest(str(folder), "merged", out, dtype="bfloat16", tolerance=1e-6))
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["adapter"]


def test_tied_embeddings_are_not_changed_behind_ones_back(tmp_path: Path, tiny_model: Path, make) -> None:
    base = tmp_path / "tied"
    gpt2().save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, base)
    folder = make(base=base, target_modules=["lm_head", "c_attn"])
    model = load_adapted(str(folder), str(base), "float32")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"lm_head shares its weight with transformer\.wte"):
        refuse_shared(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def quantized(tiny_model: Path, folder: Path) -> Path:
    """A base that says it is quantized."""
    shutil.copytree(tiny_model, folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_quantized_base_is_refused_before_it_is_loaded(make, tiny_model: Path, tmp_path: Path) -> None:
    folder, base = make(), quantized(tiny_model, tmp_path / "base")
    with pytest.raises(UserError, match=r"the base model is quantized \(bitsandbytes\).*--dequantize"):
        export(ExportRequest(str(folder), "merged", tmp_path / "out", model=str(base)))


def test_on_request_a_quantized_base_is_dequantized(make, tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    """No quantizer runs on a CPU here: that the model is asked to dequantize itself is all that is shown."""
    folder, base = make(), quantized(tiny_model, tmp_path / "base")
    asked = []

    def load(name: str, dtype: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        if name == str(base):
            model.config.quantization_config = {"quant_method": "bitsandbytes"}

        def dequantize() -> Any:
            asked.append(name)
            del model.config.quantization_config
            return model

        model.dequantize = dequantize
        return model

    monkeypatch.setattr("loraplex.export.exporting.load_model", load)
    export(ExportRequest(str(folder), "merged", tmp_path / "out", model=str(base), dtype="float32", dequantize=True))
    assert asked == [str(base)]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
