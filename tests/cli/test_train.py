"""`loraplex train` as a user meets it: what is wrong is one line, and Ctrl-C loses nothing."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.warm_python import WarmPython

from loraplex.cli.main import main


@pytest.fixture
def fails(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]):
    """Run the tiny recipe with overrides that make it fail; return the one line, and check that nothing was lost."""

    def run(*overrides: str, flags: tuple[str, ...] = ()) -> str:
        folder = tiny_recipe.parent / "run"
        before = sorted(folder.rglob("*"))
        assert main(["train", str(tiny_recipe), *overrides, *flags, "--quiet"]) == 1
        assert sorted(folder.rglob("*")) == before
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return run


def with_rows(tiny_recipe: Path, text: str) -> str:
    path = tiny_recipe.parent / "bad.jsonl"
    path.write_text(text)
    return str(path)


def test_a_broken_line_of_data(fails, tiny_recipe: Path) -> None:
    path = with_rows(tiny_recipe, '{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    assert f"{path}:2" in fails("--data", path)


def test_a_missing_field_of_data(fails, tiny_recipe: Path) -> None:
    path = with_rows(tiny_recipe, '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    line = fails("--data", path)
    assert f"{path}:2" in line
    assert "'completion'" in line


def test_an_empty_data_set(fails, tiny_recipe: Path) -> None:
    path = with_rows(tiny_recipe, "\n")
    line = fails("--data", path)
    assert path in line
    assert "empty" in line or "no rows" in line


def test_a_missing_data_file(fails, tiny_recipe: Path) -> None:
    missing = str(tiny_recipe.parent / "row.jsonl")
    line = fails("--data", missing)
    assert missing in line
    assert "rows.jsonl" in line


def test_no_data_at_all(fails) -> None:
    assert "data.train is not set" in fails("--data.train", "null")


def test_a_length_that_cuts_every_completion_away(fails) -> None:
    assert "max_length 2 leaves nothing of the completion of any of the 24 rows" in fails("--max-length", "2")


def test_more_validation_rows_than_rows(fails) -> None:
    line = fails("--validation-rows", "24")
    assert line.endswith("training.validation_rows is 24 of 24 training rows: none would be left to train on")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--target-modules", "[q_porj]"], "'q_porj' not found in the base model"),
        (["--target-modules", "[q_porj]"], "Did you mean 'q_proj'"),
        (["--adapter", "dorra"], "unknown adapter 'dorra': known are"),
        (["--r", "0"], "rank of the adapter (r) is 0: give a whole number of at least 1"),
        (["--r", "-3"], "rank of the adapter (r) is -3"),
        (["--r", "33"], "but this site allows at most"),
        (["--lora-dropout", "1.5"], "lora_dropout is 1.5"),
        (["--model", "./nowhere"], "model folder './nowhere' does not exist"),
        (["--trainer_args.adam_beta", "0.5"], "unknown key '--trainer_args.adam_beta'"),
        (
            ["--training.trainer_args.adam_beta", "0.5"],
            "training.trainer_args.adam_beta is not an argument of SFTConfig. Did you mean 'adam_beta",
        ),
        (
            ["--training.trainer_args.learning_rate", "0.5"],
            "training.trainer_args.learning_rate: set training.learning_rate instead",
        ),
        (["--training.trainer_args.logging_nan_inf_filter", "true"], "leave it out, the command sets it"),
        (["--optimizer", "adamm"], "training: "),
        (["--training.schedule", "sawtooth"], "training: "),
    ],
)
def test_a_value_that_cannot_be(overrides: list[str], expected: str, fails) -> None:
    assert expected in fails(*overrides)


def test_an_output_folder_that_is_not_a_run(fails, tiny_recipe: Path) -> None:
    folder = tiny_recipe.parent / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for flags in ((), ("--overwrite",), ("--resume",)):
        assert f"output '{folder}' is not empty and not a run of loraplex" in fails(flags=flags)


def test_an_output_folder_that_is_a_file(fails, tiny_recipe: Path) -> None:
    (tiny_recipe.parent / "run").write_text("mine")
    assert "is a file: choose another --output" in fails()


def test_a_finished_run_is_kept(fails, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tiny_recipe), "--max-length", "23", "--max-steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "cut to length" in shown
    assert "reloaded and compared" in shown
    run = tiny_recipe.parent / "run"
    assert json.loads((run / "metrics.json").read_text())["rows"]["truncated"] > 0
    overrides = ("--max-length", "23", "--max-steps", "2")
    assert "is not empty: --resume goes on with that run, --overwrite replaces it" in fails(*overrides)
    assert "exclude each other" in fails(*overrides, flags=("--resume", "--overwrite"))
    # Mistakes that show late, when the model is there, do not cost the old run either.
    assert "allows at most" in fails("--r", "33", flags=("--overwrite",))


def test_a_base_that_does_not_fit_the_adapter(
    tiny_recipe: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tiny_recipe), "--max-steps", "1", "--quiet"]) == 0
    other = tiny_recipe.parent / "other-model"
    shutil.copytree(tiny_model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    adapter = str(tiny_recipe.parent / "run")
    assert main(["generate", adapter, "--model", str(other), "--prompt", "the cat"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"was trained on '{tiny_model}' with num_hidden_layers 2, this base model has 1: use '{tiny_model}'" in error


def test_ctrl_c_saves_and_resuming_ends_where_an_uninterrupted_run_does(
    tiny_recipe: Path, warm_python: WarmPython
) -> None:
    folders = {name: tiny_recipe.parent / name for name in ("whole", "stopped")}
    long = ["--max-steps", "60", "--training.save_every", "20", "--evaluation.kind", "none"]
    process = warm_python.start("-m", "loraplex", "train", str(tiny_recipe), *long, "--output", str(folders["stopped"]))
    checkpoint = folders["stopped"] / "checkpoints/checkpoint-20/loraplex_files.json"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    last = error.splitlines()[-1]
    assert last.startswith("interrupted: stopped after step ")
    assert last.endswith(" of 60, checkpoint saved; go on with --resume")
    stopped_at = int(last.split()[4])
    assert 20 <= stopped_at < 60
    assert (folders["stopped"] / f"checkpoints/checkpoint-{stopped_at}/loraplex_files.json").exists()
    assert not (folders["stopped"] / "adapter").exists()

    assert main(["train", str(tiny_recipe), *long, "--output", str(folders["stopped"]), "--resume", "--quiet"]) == 0
    assert main(["train", str(tiny_recipe), *long, "--output", str(folders["whole"]), "--quiet"]) == 0
    resumed, whole = (load_file(folder / "adapter/adapter_model.safetensors") for folder in folders.values())
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_wrong_recipe_ends_with_status_one_in_a_process_of_its_own(
    tiny_recipe: Path, warm_python: WarmPython
) -> None:
    done = warm_python.run("-m", "loraplex", "train", str(tiny_recipe), "--training.batch-size", "none of it")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: --training.batch_size is 'none of it', expected a valid integer.\n"
