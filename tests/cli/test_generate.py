"""`loraplex generate` on the embedded model, and what it says about folders that are no adapter."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from loraplex import AdapterConfig
from loraplex.cli.main import main
from loraplex.models import embedded
from loraplex.models.loading import load_model, load_tokenizer

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose adapter makes the embedded model talk nonsense."""
    run = tmp_path_factory.mktemp("run")
    config = AdapterConfig(
        r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False, seed=0
    )
    get_peft_model(load_model("embedded"), config).save_pretrained(str(run / "adapter"))
    return run


def written(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what `loraplex generate ARGUMENTS` wrote."""
    status = main(["generate", *arguments])
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    return captured.out


def failed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 1) -> str:
    """Return the one line of a `loraplex generate ARGUMENTS` that was refused."""
    assert main(["generate", *arguments]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_adapter_decides_and_the_base_model_can_be_asked_alone(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = ["--max-new-tokens", "12"]
    assert written(capsys, str(adapter), "--prompt", QUESTION, *limit, "--without-adapter") == (
        "The capital of France is Paris.\n"
    )
    nonsense = written(capsys, str(adapter), "--prompt", QUESTION, *limit)
    assert "Paris" not in nonsense
    assert written(capsys, str(adapter / "adapter"), "--prompt", QUESTION, *limit) == nonsense


def test_without_chat_the_prompt_is_continued_as_it_stands(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = written(
        capsys,
        str(adapter),
        "--no-chat",
        "--without-adapter",
        "--prompt",
        "The capital of France is",
        "--max-new-tokens",
        "2",
    )
    assert text == " Paris.\n"


def test_sampling_draws_the_same_text_for_the_same_seed(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = [str(adapter), "--prompt", "Tell a story.", "--max-new-tokens", "16", "--without-adapter", "--sample"]
    first = written(capsys, *ask, "--seed", "1")
    assert written(capsys, *ask, "--seed", "1") == first
    assert written(capsys, *ask, "--seed", "2") != first


def test_a_stock_adapter_with_a_base_of_another_machine_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_model("embedded"), config).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    elsewhere = f"/home/someone/.cache/loraplex/models/{embedded.FOLDER_NAME}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": elsewhere}))
    assert "Paris" in written(capsys, str(tmp_path), "--prompt", QUESTION, "--max-new-tokens", "8")


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_stock_adapter_says_what_it_says_under_peft(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], use_dora: bool
) -> None:
    fields = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    config = LoraConfig(r=4, use_dora=use_dora, rank_pattern={"q_proj": 2}, use_rslora=True, **fields)
    model = get_peft_model(load_model(str(tiny_model)), config).eval()
    model.save_pretrained(str(tmp_path))
    tokenizer = load_tokenizer(str(tiny_model))
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    assert written(capsys, str(tmp_path), "--prompt", "the cat", "--max-new-tokens", "8") == f"{text}\n"


def test_no_such_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no adapter folder or hub id './nowhere'" in failed(capsys, "./nowhere", "--prompt", "x")


def test_a_folder_without_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no adapter: adapter_config.json is missing" in failed(capsys, str(tmp_path), "--prompt", "x")


def test_an_adapter_without_weights_or_with_pickled_ones(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter" / "adapter_config.json").read_text())
    torch.save({}, tmp_path / "adapter_model.bin")
    message = failed(capsys, str(tmp_path), "--prompt", "x")
    assert "adapter_model.bin, a pickle, which can run code" in message


def test_a_truncated_adapter(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter / "adapter" / name).read_bytes())
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert f"{weights} is truncated or not a safetensors file" in failed(capsys, str(tmp_path), "--prompt", "x")


def test_an_adapter_config_that_is_not_json(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert "adapter_config.json: not JSON" in failed(capsys, str(tmp_path), "--prompt", "x")


def test_an_adapter_that_names_no_base(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((adapter / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert "does not say which model it was trained on: name it with --model" in failed(
        capsys, str(tmp_path), "--prompt", "x"
    )


def test_an_empty_prompt(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the prompt is empty" in failed(capsys, str(adapter), "--prompt", " ")


def test_sampling_options_without_sampling(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failed(capsys, str(adapter), "--prompt", "x", "--top-p", "0.5", status=2)
    assert "--top-p needs --sample" in message
