"""`loraplex plan` as a user meets it."""

import json
from pathlib import Path

import pytest

from loraplex.allocation.plan import Plan
from loraplex.cli.main import main
from loraplex.training.reading import read_recipe


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


def test_candidates_and_budget_are_two_rows(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # so that the table does not wrap
    monkeypatch.setenv("COLUMNS", "160")
    hetero = "{name: hetero, share: 0.5, unit: UNIT}"
    rows = {}
    for unit in ("parameters", "modules"):
        assert main(["plan", str(tiny_recipe), "--allocation", hetero.replace("UNIT", unit)]) == 0
        lines = capsys.readouterr().out.splitlines()
        rows[unit] = [line for line in lines if "all candidates" in line or "kept, " in line]
    # 14 sites of rank 2, of which half is kept: 928 · 2 parameters, or seven of the sites
    candidates, most = rows["parameters"]
    assert "1,856" in candidates
    assert "kept, at most (928 parameters)" in most
    assert ["about (7 modules)" in line or "at most (7 modules)" in line for line in rows["modules"]] == [0, 1, 1]


def test_a_plan_of_ones_own_is_shown_and_trained(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = {"model.layers.0.self_attn.q_proj": 3, "model.layers.1.mlp.up_proj": 5, "model.layers.1.mlp.down_proj": 0}
    path = tiny_recipe.with_name("plan.json")
    Plan(ranks).save(path)
    allocation = ["--allocation", f"{{name: uniform, plan: {path}}}"]
    assert main(["plan", str(tiny_recipe), *allocation, "--json"]) == 0
    adapted = {site: rank for site, rank in ranks.items() if rank}
    shown = json.loads(capsys.readouterr().out)
    assert shown["ranks"] == adapted
    assert shown["trainable"] == 3 * 64 + 5 * 80
    assert main(["train", str(tiny_recipe), *allocation, "--quiet"]) == 0
    folder = tiny_recipe.parent / "run"
    assert Plan.load(folder / "plan.json").ranks == adapted
    # the run knows the ranks themselves, wherever the file goes
    path.unlink()
    assert read_recipe(folder / "recipe.yaml").adapter.to_dict()["allocation"] == {"name": "uniform", "plan": ranks}
    assert json.loads((folder / "metrics.json").read_text())["parameters"]["deployed"] == shown["trainable"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--allocation", "{name: uniform, plan: {model.layers.0.self_attn.q_porj: 2}}"], "Did you mean"),
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
