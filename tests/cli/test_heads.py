"""`loraplex heads` through the entry point: number, evidence, pictures, and what it refuses."""

import json
from pathlib import Path

import pytest
from tests.analysis.topics import TOPICS, prompts

from loraplex.cli.main import main


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Instructions on three topics, each with its task."""
    path = tmp_path / "rows.jsonl"
    texts, truth = prompts(3)
    lines = [
        {"instruction": text, "output": "x", "task": f"t{topic}"} for text, topic in zip(texts, truth, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_number_its_evidence_and_the_groups(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["heads", str(rows)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("heads: 3\nelbow and silhouette agree on 3 (kmeans, 120 of 120 texts)\n")
    lines = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.count("│") > 2}
    assert "elbow, highest silhouette, suggested" in printed
    assert any(word in printed for word in TOPICS[0].split())
    assert lines["t0"].count("40") == 1
    assert lines["t0"].count("·") == 2


def test_as_json_with_the_group_of_every_row(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["heads", str(rows), "--json", "--method", "ward", "--most", "6"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["number"], found["method"], found["texts"]) == (3, "ward", 120)
    assert [entry["groups"] for entry in found["partitions"]] == [2, 3, 4, 5, 6]
    assert len(found["rows"]) == 120
    assert found["rows"][0]["source"] == f"{rows}:1"
    assert {task: sum(counts.values()) for task, counts in found["tasks"].items()} == {"t0": 40, "t1": 40, "t2": 40}
    assert len(found["groups"]) == 3


@pytest.mark.parametrize(("method", "names"), [("kmeans", {"curve", "tree", "map"}), ("dbscan", {"tree", "map"})])
def test_pictures(rows: Path, tmp_path: Path, method: str, names: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    assert main(["heads", str(rows), "--method", method, "--output", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in names}
    printed = capsys.readouterr().out.replace("\n", "")
    for path in folder.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"drawn: {path}" in printed


def test_a_recipe_stands_for_its_training_rows(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output: run\ndata: {{train: {rows}, max_train: 60}}\n")
    assert main(["heads", str(recipe)]) == 0
    assert "heads: 3" in (printed := capsys.readouterr().out)
    assert "60 of 60 texts" in printed


def test_a_prompt_names_the_text_of_rows_in_no_known_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps({"input": text, "target": "x"}) + "\n" for text in prompts(5)[0]))
    assert main(["heads", str(path)]) == 1
    assert "fit no known form" in (error := capsys.readouterr().err)
    assert "--prompt '{field}'" in error
    assert main(["heads", str(path), "--prompt", "{input}"]) == 0
    assert "heads: 5" in capsys.readouterr().out


def test_what_is_refused(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, file = tmp_path / "empty.jsonl", tmp_path / "file"
    empty.write_text("")
    file.write_text("x")
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "planet", "completion": "x"}\n' * 3)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output: run\ndata: {{train: {rows}}}\n")
    for arguments, status, message in [
        ([str(empty)], 1, "has no rows"),
        ([str(few)], 1, "1 different texts among 3 are too few to tell 10 groups apart"),
        ([str(tmp_path / "row.jsonl")], 1, "Did you mean 'rows.jsonl'?"),
        ([str(rows), "--least", "6", "--most", "5"], 1, "the numbers to try, 6 to 5, make no sense"),
        ([str(rows), "--least", "1"], 1, "the numbers to try, 1 to 10, make no sense"),
        ([str(rows), "--most", "200"], 1, "too few to tell 200 groups apart"),
        ([str(rows), "--method", "means"], 2, "argument --method: invalid choice: 'means'"),
        ([str(rows), "--output", str(file)], 1, "is a file: give a folder"),
        ([str(rows), str(recipe)], 1, "is a recipe: give it alone"),
        ([str(recipe), "--prompt", "{x}"], 1, "--prompt and --limit go with data"),
        ([], 2, "the following arguments are required: DATA"),
    ]:
        assert main(["heads", *arguments]) == status, arguments
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1, error
