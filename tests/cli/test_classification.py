"""Adapters with a classification head on the command line: measured as their run did, refused where text is wanted."""

import json
from pathlib import Path

import pytest
from tests.conftest import write_pairs_recipe

from loraplex.cli.main import main


@pytest.fixture(scope="module")
def run(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", str(write_pairs_recipe(folder, tiny_encoder)), "--quiet", "--max-steps", "4"]) == 0
    return folder / "run"


def evaluate(run: Path, *choices: str, output: Path | None = None) -> int:
    rows = ["--data", str(run.parent / "pairs.jsonl"), "--prompt", "{first}", "--second", "{other}"]
    named = [word for choice in choices for word in ("--choice", choice)]
    written = ["--output", str(output)] if output else []
    return main(["eval", str(run), *rows, *named, "--answer", "label", "--quiet", *written])


def test_eval_finds_what_the_run_found(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(run, "dog", "cat", output=tmp_path / "found") == 0
    found = json.loads((tmp_path / "found/metrics.json").read_text())
    after = json.loads((run / "metrics.json").read_text())["accuracy"]["after"]
    assert {key: found[key] for key in after} == after
    assert f"F1: {after['f1']:.3f}" in capsys.readouterr().out


def test_eval_refuses_classes_in_another_order(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(run, "cat", "dog") == 1
    assert "the row has the options cat, dog, the classes are dog, cat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "RUN", "--prompt", "the cat"], "tells classes apart (dog, cat) and says nothing else: generate"),
        (["eval", "RUN", "--lm-eval", "arc_easy"], "--lm-eval needs a language model"),
        (["eval", "RUN", "--data", "RUN/../pairs.jsonl", "--prompt", "a", "--completion", "b", "--base"], "--base"),
        (["export", "RUN", "--to", "merged"], "it was trained with a classification head"),
    ],
)
def test_what_needs_a_language_model_is_refused(
    command: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.replace("RUN", str(run)) for word in command]) == 1
    assert message in capsys.readouterr().err


def test_inspect_and_plan_show_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run)]) == 0
    assert "whole modules (classifier" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", str(run.parent / "recipe.yaml"), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["trainable"] == json.loads((run / "metrics.json").read_text())["parameters"]["trainable"]
