"""`loraplex inspect` through the entry point."""

import json
from pathlib import Path

import pytest

from loraplex.cli.main import main


@pytest.fixture(params=["lora", "dora"])
def adapter(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    """A stock folder whose B is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    fields = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"layers.0.mlp.down_proj": 3}}
    config = LoraConfig(use_dora=request.param == "dora", init_lora_weights=False, **fields)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path)
    return tmp_path


def test_a_line_for_every_kind_and_for_every_target(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter)]) == 0
    out = capsys.readouterr().out
    assert "plain PEFT LoRA" in out
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if line.count("│") > 2}
    assert "3–8" in lines["down_proj"]
    assert set(lines) >= {"q_proj", "down_proj", "peft", "vllm", "merged", "gguf"}
    assert "yes" in lines["merged"]


def test_a_line_for_every_site(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["inspect", str(adapter), "--sites"]) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out


def test_as_json_with_every_singular_value(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {site["name"]: len(site["spectrum"]) for site in found["sites"]} == {
        "model.layers.0.self_attn.q_proj": 8,
        "model.layers.0.mlp.down_proj": 3,
        "model.layers.1.self_attn.q_proj": 8,
        "model.layers.1.mlp.down_proj": 8,
    }
    assert found["exports"]["peft"] is None
    assert found["exports"]["merged"] is None
    plain = found["method"] == "lora"
    for target in ("vllm", "gguf"):
        assert (found["exports"][target] is None) is plain


def test_what_is_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "holds no adapter: adapter_config.json is missing" in error
    assert error.count("\n") == 1
