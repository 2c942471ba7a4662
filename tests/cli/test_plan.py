"""`loraplex plan` as a user meets it."""

import json
from pathlib import Path

import pytest

from loraplex.cli.main import main


def test_the_tables_name_sites_parameters_memory_and_time(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tiny_recipe)]) == 0
    shown = capsys.readouterr().out
    for word in ("q_proj", "down_proj", "share of the model", "activations", "estimates", "training time"):
        assert word in shown
    assert not (tiny_recipe.parent / "run").exists()


def test_json_holds_the_rank_of_every_site(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tiny_recipe), "--json", "--r", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["ranks"]) == 14
    assert set(found["ranks"].values()) == {3}
    assert found["memory"]["total"] == found["memory"]["above_weights"] + found["memory"]["weights"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--target-modules", "[q_porj]"], "Did you mean 'q_proj'"),
        (["--r", "0"], "rank of the adapter (r) is 0"),
        (["--max-length", "2"], "leaves nothing of the completion"),
        (["--lerning-rate", "1"], "Did you mean 'training.learning_rate'?"),
    ],
)
def test_it_refuses_what_train_refuses(
    overrides: list[str], expected: str, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tiny_recipe), *overrides]) == 1
    assert expected in capsys.readouterr().err
