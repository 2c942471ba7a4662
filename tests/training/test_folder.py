"""What an earlier run has left is there until the one that replaces it has finished, whatever happens in between."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import write_tiny_recipe
from transformers import TrainerCallback

from loraplex.errors import UserError
from loraplex.training.reading import read_recipe
from loraplex.training.recipe import Recipe
from loraplex.training.run import train


class EndAt(TrainerCallback):
    """Ends training with an error after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("the machine is on fire")


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run that the tests of this module copy."""
    recipe = read_recipe(write_tiny_recipe(tmp_path_factory.mktemp("finished"), tiny_model))
    train(recipe)
    return recipe


@pytest.fixture
def earlier(finished: Recipe, tmp_path: Path) -> Recipe:
    """A recipe with a finished run of it in its output folder, beside a file of the user."""
    shutil.copytree(finished.output, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    return dataclasses.replace(finished, output=str(tmp_path / "run"))


def content(recipe: Recipe) -> dict[str, bytes]:
    folder = Path(recipe.output)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hidden(recipe: Recipe) -> list[Path]:
    return list(Path(recipe.output).glob(".*"))


def test_a_run_that_cannot_start_leaves_the_earlier_one(earlier: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    before = content(earlier)
    # its package is not installed, which shows when the trainer makes the optimizer
    options = dataclasses.replace(earlier.training, optimizer="lomo")
    with pytest.raises(ImportError, match="lomo"):
        train(dataclasses.replace(earlier, training=options), overwrite=True)
    assert content(earlier) == before
    assert "the earlier run is back" in caplog.text


def test_a_run_that_fails_after_a_checkpoint_keeps_both(earlier: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    before = content(earlier)
    with pytest.raises(RuntimeError, match="on fire"):
        train(earlier, overwrite=True, callbacks=[EndAt(4)])
    (aside,) = hidden(earlier)
    assert str(aside) in caplog.text
    kept = {str(path.relative_to(aside)): path.read_bytes() for path in aside.rglob("*") if path.is_file()}
    assert kept == {name: value for name, value in before.items() if name != "notes.txt"}
    caplog.clear()
    with pytest.raises(UserError, match="is not empty"):
        train(earlier)
    assert str(aside) in caplog.text
    train(earlier, resume=True)
    assert hidden(earlier) == []
    assert content(earlier)["notes.txt"] == b"mine"


def test_an_unfinished_run_that_is_replaced_in_vain_comes_back(earlier: Recipe) -> None:
    with pytest.raises(RuntimeError, match="on fire"):
        train(earlier, overwrite=True, callbacks=[EndAt(4)])
    before = content(earlier)
    with pytest.raises(RuntimeError, match="on fire"):
        train(earlier, overwrite=True, callbacks=[EndAt(1)])
    assert content(earlier) == before
    train(earlier, overwrite=True)
    assert hidden(earlier) == []


def test_a_killed_process_has_lost_nothing(earlier: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    before = content(earlier)
    code = (
        "import os, sys\n"
        "from dataclasses import replace\n"
        "from transformers import TrainerCallback\n"
        "from loraplex.training.reading import read_recipe\n"
        "from loraplex.training.run import train\n"
        "class Kill(TrainerCallback):\n"
        "    def on_step_end(self, *args, **kwargs):\n"
        "        os.kill(os.getpid(), 9)\n"
        "folder = sys.argv[1]\n"
        "recipe = read_recipe(folder + '/recipe.yaml')\n"
        "train(replace(recipe, output=folder), overwrite=True, callbacks=[Kill()])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, earlier.output], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert content(earlier) != before
    with pytest.raises(UserError, match="is not empty"):
        train(earlier)
    assert content(earlier) == before
    assert "the earlier run is back" in caplog.text


@pytest.mark.parametrize("moved", [0, 1, 3, 100])
def test_a_process_killed_while_it_moved_files_has_lost_nothing(earlier: Recipe, moved: int) -> None:
    from loraplex.files import hidden as hidden_name
    from loraplex.training.folder import RunFolder

    before, folder = content(earlier), RunFolder(earlier.output)
    aside = hidden_name(folder.path / "earlier-run", "old")
    aside.mkdir()
    for path in [path for path in folder.contents if path.exists()][:moved]:
        path.rename(aside / path.name)
    folder.recover()
    assert content(earlier) == before
    assert hidden(earlier) == []


def test_what_the_finished_run_has_replaced_is_deleted_after_a_kill_in_between(earlier: Recipe) -> None:
    from loraplex.files import hidden as hidden_name
    from loraplex.training.folder import RunFolder

    before, folder = content(earlier), RunFolder(earlier.output)
    aside = hidden_name(folder.path / "earlier-run", "old")
    aside.mkdir()
    (aside / "metrics.json").write_text(json.dumps({}))
    folder.recover()
    assert content(earlier) == before
    assert hidden(earlier) == []
