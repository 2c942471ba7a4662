"""`loraplex report`: stored results in, a page out; mistakes in one line."""

from pathlib import Path

import pytest
from tests.comparison.simulated import ARMS, simulated

from loraplex.cli.main import main
from loraplex.comparison import page
from loraplex.comparison.results import Comparison, write_results


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Comparison], Path]]:
    """What `write_report` was called with; it writes nothing."""
    calls: list[tuple[list[Comparison], Path]] = []

    def write(comparisons: list[Comparison], folder: Path) -> Path:
        calls.append((comparisons, folder))
        return folder / "report.html"

    monkeypatch.setattr(page, "write_report", write)
    return calls


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two folders with results."""
    for seed, name in enumerate(("first", "second")):
        write_results(simulated(name, ARMS[:2], seed), tmp_path / name)
    return [tmp_path / "first", tmp_path / "second"]


def test_one_folder_gets_its_report_back(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folders[0])]) == 0
    assert capsys.readouterr().out == f"written to {folders[0] / 'report.html'}\n"
    assert "first" in (folders[0] / "report.html").read_text(encoding="utf-8")
    assert (folders[0] / "plots" / "accuracy.png").exists()


def test_several_folders_are_shown_on_one_page(
    folders: list[Path], tmp_path: Path, written: list[tuple[list[Comparison], Path]]
) -> None:
    assert main(["report", *map(str, folders), "--output", str(tmp_path / "both")]) == 0
    [(comparisons, folder)] = written
    assert comparisons == [simulated("first", ARMS[:2], 0), simulated("second", ARMS[:2], 1)]
    assert folder == tmp_path / "both"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["first", "second"],
            "error: a report of several comparisons has no folder of its own: name one with --output",
        ),
        (["first", "./first", "--output", "x"], "'first' is named more than once: name every comparison once"),
        (["nowhere"], "there are no results of a comparison in 'nowhere': results.json is missing"),
        (["first", "--output", "first/results.json"], "output 'first/results.json' is a file: give a folder"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    folders: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    written: list[tuple[list[Comparison], Path]],
) -> None:
    monkeypatch.chdir(folders[0].parent)
    assert main(["report", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not written


def test_no_folder_is_a_command_line_that_makes_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 2
    assert "FOLDER" in capsys.readouterr().err
