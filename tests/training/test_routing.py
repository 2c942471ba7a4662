"""A run of a routed adapter: what it logs, what it leaves, and that `inspect` finds it."""

import json
from pathlib import Path

import pytest
from tests.conftest import WORDS

from loraplex.cli.main import main
from loraplex.training.reading import read_recipe
from loraplex.training.run import train


@pytest.fixture
def recipe(tiny_recipe: Path) -> Path:
    """The tiny recipe with a router, and rows of three tasks."""
    text = tiny_recipe.read_text().replace("adapter: lora", "adapter: {name: hydra, heads: 3}")
    tiny_recipe.write_text(text)
    rows = tiny_recipe.parent / "rows.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for index, line in enumerate(lines):
        line["task"] = ("red", "green", "blue")[index % 3]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tiny_recipe


def test_what_a_run_leaves(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    result = train(read_recipe(recipe), say=lambda topic, text: said.append((topic, text)))
    assert "equal to the bit in loraplex, which alone can compute it" in dict(said)["saved"]
    found = json.loads((result.folder / "routing.json").read_text())
    assert [entry["step"] for entry in found["over_training"]] == [1, 2, 3, 4, 5, 6]
    assert all(0 < entry["entropy"] <= 1 for entry in found["over_training"])
    assert [snapshot["step"] for snapshot in found["snapshots"]] == [1, 2, 3, 4, 5, 6]
    assert len(found["snapshots"][0]["sites"]) == 14
    assert list(found["tasks"]) == ["red", "green", "blue"]
    for sites in found["tasks"].values():
        assert len(sites) == 14
        assert all(sum(site["load"]) == pytest.approx(1, abs=1e-5) for site in sites.values())
    assert (result.folder / "routing.png").is_file()
    assert set(result.metrics["routing"]) == {"router_entropy", "dead_heads"}
    assert "routing" not in json.loads((result.folder / "metrics.json").read_text())["loss"][0]

    assert main(["inspect", str(result.folder)]) == 0
    printed = capsys.readouterr().out
    assert "mean gates on the test rows" in printed
    assert all(task in printed for task in ("red", "green", "blue", "down_proj"))


def test_a_resumed_run_has_the_course_of_the_whole(recipe: Path) -> None:
    whole = train(read_recipe(recipe))
    expected = (whole.folder / "routing.json").read_text()
    for name in ("metrics.json", "routing.json"):
        (whole.folder / name).unlink()
    train(read_recipe(recipe), resume=True)
    assert json.loads((whole.folder / "routing.json").read_text()) == json.loads(expected)


def test_inspect_measures_other_rows(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(read_recipe(recipe))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": WORDS, "completion": " the cat", "task": "elsewhere"}) + "\n")
    assert main(["inspect", str(result.folder), "--data", str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["routing"]
    assert found["rows"] == "given"
    assert list(found["tasks"]) == ["elsewhere"]


def test_an_adapter_without_a_router_has_nothing_to_show(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(read_recipe(tiny_recipe))
    assert not (result.folder / "routing.json").exists()
    assert "routing" not in result.metrics
    assert main(["inspect", str(result.folder), "--data", str(tmp_path / "rows.jsonl")]) == 1
    assert "routes nothing" in capsys.readouterr().err
