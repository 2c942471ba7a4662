"""`loraplex export` through the entry point, with stock PEFT in a process without loraplex."""

import json
from pathlib import Path

import pytest

from loraplex.cli import export
from loraplex.cli.main import main
from loraplex.export.exporting import DTYPES, default_output
from loraplex.export.targets import TARGETS


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """A stock LoRA folder with two scales."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    fields = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "alpha_pattern": {"q_proj": 3}}
    model = get_peft_model(base, LoraConfig(**fields))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_it_says_what_was_written_and_how_well_it_agrees(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(adapter), "--to", "vllm"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    written, *verified, done = captured.out.splitlines()
    assert written == "written:   plain LoRA, rank 8 at 4 sites, padded with zeros to rank 8; scale 1"
    assert [line.partition(":  ")[2].split(":")[0] for line in verified] == ["stock PEFT", "the engines' reading rule"]
    assert all("same top token at 100.00%" in line and " KL " in line for line in verified)
    assert done == f"done:      {tmp_path / 'adapter-vllm'}"
    assert {file.name for file in (tmp_path / "adapter-vllm").iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors")
    }


def test_rows_of_ones_own_are_compared(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "the cat ", "completion": "sat"}) + "\n" for _ in range(9)))
    assert main(["export", str(adapter), "--to", "merged", "--data", str(rows), "--limit", "2"]) == 0
    assert "positions" in capsys.readouterr().out


def test_what_is_refused(adapter: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept").write_text("x")
    for arguments, status, message in [
        ([str(adapter)], 2, "the following arguments are required: --to"),
        ([str(adapter), "--to", "onnx"], 2, "argument --to: invalid choice: 'onnx'"),
        ([str(adapter), "--to", "peft", "--dequantize"], 2, "--dequantize belongs to --to merged"),
        ([str(adapter), "--to", "peft", "--output", str(full)], 1, "is not empty: --overwrite"),
        ([str(adapter), "--to", "peft", "--output", str(full), "--overwrite"], 1, "is not an earlier export"),
        ([str(adapter), "--to", "peft", "--output", str(full / "kept")], 1, "is a file"),
        (["./nowhere", "--to", "peft"], 1, "no adapter folder or hub id './nowhere'"),
        ([str(adapter), "--to", "merged", "--dtype", "bfloat16", "--tolerance", "0"], 1, "nothing was put in place"),
    ]:
        assert main(["export", *arguments]) == status, arguments
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1, error
    assert {entry.name for entry in tmp_path.iterdir()} == {"adapter", "full"}
    assert (full / "kept").read_text() == "x"


def test_an_earlier_export_is_replaced_on_request(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(adapter), "--to", "gguf"]
    assert main(arguments) == 0
    assert main(arguments) == 1
    assert "adapter-gguf' is not empty: --overwrite replaces an earlier export" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_the_choices_are_those_of_the_package() -> None:
    # The command lists them itself, because its help page imports nothing of the package.
    assert list(export.TARGETS) == list(TARGETS)
    assert list(export.DTYPES) == ["auto", *DTYPES]


def test_where_it_goes_by_default(tmp_path: Path) -> None:
    assert default_output("owner/name", "vllm") == Path("name-vllm")
    (tmp_path / "run").mkdir()
    assert default_output(str(tmp_path / "run"), "peft") == tmp_path / "run-peft"
