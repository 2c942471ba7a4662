"""`loraplex eval` through the entry point: what it prints, what it writes, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from loraplex.cli.main import main

WORDS = ("the", "cat", "sat", "mat", "and", "dog", "ran", "over", "hill", "rain")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twenty questions with two options, of two tasks."""
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for number in range(20):
            row = {"question": WORDS[number % 10], "choices": ["cat", "dog sat"], "answer": number % 2}
            file.write(json.dumps({**row, "task": "ab"[number // 10]}) + "\n")
    return path


@pytest.fixture(params=["lora", "dora"])
def adapter(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    """A folder of stock PEFT whose adapter changes what the model says."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    fields = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "use_rslora": True}
    model = get_peft_model(base, LoraConfig(use_dora=request.param == "dora", **fields))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.5)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    return json.loads((folder / "metrics.json").read_text()), items


def test_an_adapter_and_its_base(
    adapter: Path, rows: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", str(rows), "--quiet", "--output"]
    assert main(["eval", str(adapter), *common, str(tmp_path / "with")]) == 0
    printed = capsys.readouterr().out
    assert main(["eval", str(adapter), "--base", *common, str(tmp_path / "base")]) == 0
    assert main(["eval", "none", "--model", str(tiny_model), *common, str(tmp_path / "none")]) == 0
    metrics, items = read(tmp_path / "with")
    assert metrics["value"] == sum(item["correct"] for item in items) / 20
    assert metrics["per_task"].keys() == {"a", "b"}
    assert metrics["majority_share"] == 0.5
    assert (metrics["adapter"], metrics["items"]) == (str(adapter), 20)
    assert f"{metrics['value']:.3f}" in printed
    assert "mean of tasks" in printed
    base, base_items = read(tmp_path / "base")
    assert base["adapter"] is None
    assert base_items == read(tmp_path / "none")[1]
    assert base_items[0]["log_probs"] != items[0]["log_probs"]


def test_a_template_on_the_command_line(rows: Path, tiny_model: Path, tmp_path: Path) -> None:
    template = ["--prompt", "{question} =", "--choice", " cat", "--choice", " dog", "--limit", "6"]
    out = tmp_path / "out"
    arguments = ["none", "--model", str(tiny_model), "--data", str(rows), *template, "--output", str(out), "--quiet"]
    assert main(["eval", *arguments]) == 0
    metrics, items = read(out)
    assert metrics["items"] == 6
    assert items[0]["options"] == [" cat", " dog"]


def test_written_answers(rows: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(rows), "--kind", "generation", "--max-new-tokens", "3", "--limit", "4", "--quiet"]
    assert main(["eval", "none", "--model", str(tiny_model), *arguments, "--output", str(out)]) == 0
    metrics, items = read(out)
    assert metrics["unparsable"] == sum(item["found"] is None for item in items) / 4
    assert "answers in which nothing was found" in capsys.readouterr().out


def test_what_is_refused(rows: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept").write_text("x")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "?", "choices": ["a", "b"], "answer": 0}\n{"question": ')
    model = ["--model", str(tiny_model), "--quiet"]
    for arguments, status, message in [
        (["none", *model], 2, "give either --data or --lm-eval"),
        (["none", *model, "--data", str(rows), "--lm-eval", "piqa"], 2, "give either --data or --lm-eval"),
        (["none", *model, "--data", str(rows), "--output", str(full)], 1, "is not empty: --overwrite"),
        (["none", *model, "--data", str(broken)], 1, "broken.jsonl:2: not JSON"),
        (["none", *model, "--data", str(tmp_path / "row.jsonl")], 1, "Did you mean 'rows.jsonl'?"),
        (["none", *model, "--data", "builtin:sylogism"], 1, "Did you mean 'syllogism'?"),
        (["nowhere/", *model, "--data", str(rows)], 1, "nowhere/"),
        (["none", *model, "--data", str(rows), "--kind", "labels"], 1, "field 'output' is missing"),
    ]:
        assert main(["eval", *arguments]) == status, arguments
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1, error
    assert [entry.name for entry in full.iterdir()] == ["kept"]
