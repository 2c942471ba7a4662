"""What makes a job another one: whatever decides its result, and nothing that only shows it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.warm_python import WarmPython

import loraplex
from loraplex import AdapterConfig
from loraplex.comparison import identity
from loraplex.comparison.identity import Identifier, Identity, deciding_source
from loraplex.comparison.jobs import Job, Kind, make_job, why_again
from loraplex.training.reading import read_recipe
from loraplex.training.recipe import Recipe


@pytest.fixture
def recipe(tiny_recipe: Path, tiny_model: Path, tmp_path: Path) -> Recipe:
    """A recipe with a base model, training rows, test rows and a named file of its own."""
    found = read_recipe(tiny_recipe)
    base, rows, named = tmp_path / "base", tmp_path / "test.jsonl", tmp_path / "settings.json"
    shutil.copytree(tiny_model, base)
    shutil.copy(tmp_path / "rows.jsonl", rows)
    named.write_text('{"stage": 2}\n')
    return replace(
        found,
        model=replace(found.model, name=str(base)),
        data=replace(found.data, test=str(rows)),
        training=replace(found.training, trainer_args={"deepspeed": str(named)}),
    )


def job(recipe: Recipe, folder: Path) -> Job:
    return make_job(Kind.TRAIN, "lora-s0", recipe, folder, Identifier())


def finished(recipe: Recipe, folder: Path) -> Job:
    """Return a job with results, as a sweep leaves it."""
    made = job(recipe, folder)
    made.folder.mkdir(parents=True)
    made.result.write_text("{}")
    made.record()
    return made


def other_letters(file: Path) -> None:
    """Change a file without changing its size."""
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def other_rate(recipe: Recipe) -> Recipe:
    return replace(recipe, training=replace(recipe.training, learning_rate=0.5))


def test_the_same_inputs_are_the_same_job(recipe: Recipe, tmp_path: Path) -> None:
    before = finished(recipe, tmp_path)
    again = job(replace(recipe, output="elsewhere"), tmp_path)
    assert again == before
    assert again.finished
    # a copy of the data with another time of change is the same data
    (tmp_path / "rows.jsonl").touch()
    assert job(recipe, tmp_path) == before
    assert Identity.read(before.folder / "identity.json") == before.identity


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("rows.jsonl", "the data of {0} have changed"),
        ("test.jsonl", "the data of {0} have changed"),
        ("settings.json", "the file {0} has changed"),
        ("base/model.safetensors", "the base model {1} has changed"),
        ("base/config.json", "the base model {1} has changed"),
    ],
)
def test_another_content_is_another_job(file: str, reason: str, recipe: Recipe, tmp_path: Path) -> None:
    before = finished(recipe, tmp_path)
    other_letters(tmp_path / file)
    after = job(recipe, tmp_path)
    assert after.folder != before.folder
    assert not after.finished
    assert why_again(after) == reason.format(tmp_path / file, tmp_path / "base")


def test_other_weights_in_a_large_file_are_found(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large file blocks are read: training moves weights everywhere."""
    monkeypatch.setattr(identity, "WHOLE", 1000)
    monkeypatch.setattr(identity, "BLOCK", 64)
    monkeypatch.setattr(identity, "_hash_of_content", identity._hash_of_content.__wrapped__)
    before, weights = job(recipe, tmp_path), tmp_path / "base/model.safetensors"
    content = bytearray(weights.read_bytes())
    for place in range(len(content) // 2, len(content), 16):
        content[place] ^= 1
    weights.write_bytes(content)
    assert job(recipe, tmp_path).identity.model != before.identity.model


def test_rows_that_are_not_read_do_not_matter(recipe: Recipe, tmp_path: Path) -> None:
    trial = replace(
        recipe,
        training=replace(recipe.training, validation_rows=4),
        evaluation=replace(recipe.evaluation, rows="validation"),
    )
    before = job(trial, tmp_path)
    other_letters(tmp_path / "test.jsonl")
    assert job(trial, tmp_path) == before


def test_every_file_of_a_folder_counts(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    shutil.copy(tmp_path / "rows.jsonl", folder / "data/train-0.jsonl")
    recipe = replace(recipe, data=replace(recipe.data, train=str(folder)))
    before = finished(recipe, tmp_path)
    shutil.copy(tmp_path / "rows.jsonl", folder / "data/train-1.jsonl")
    assert why_again(job(recipe, tmp_path)) == f"the data of {folder} have changed"
    (folder / "data/train-1.jsonl").unlink()
    assert job(recipe, tmp_path) == before


def test_a_hub_data_set_is_known_by_its_revision(recipe: Recipe, tmp_path: Path, monkeypatch: Any) -> None:
    """The rows of a folder stand for those of the hub; `datasets` keeps both in files that carry a hash."""
    import datasets

    load, asked = datasets.load_dataset, []

    def from_the_hub(source: str, name: str | None, split: str) -> Any:
        asked.append((source, name, split))
        return load(str(tmp_path / "set"), name=name, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr("datasets.load_dataset", from_the_hub)
    (tmp_path / "set").mkdir()
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "set/train.jsonl")
    recipe = replace(recipe, data=replace(recipe.data, train="owner/rows"))
    identifier = Identifier()
    before, again = (identifier.identity(Kind.TRAIN, recipe) for _ in range(2))
    assert again == before
    assert asked == [("owner/rows", None, "train")]
    assert before.data["owner/rows (train)"].endswith(".arrow")
    other_letters(tmp_path / "set/train.jsonl")
    after = Identifier().identity(Kind.TRAIN, recipe)
    assert after.changes_since(before) == ["the data of owner/rows (train) have changed"]


def test_packages_that_compute_or_make_the_data_count(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(recipe, data=replace(recipe.data, train="builtin:syllogism"))
    before = Identifier().identity(Kind.TRAIN, recipe)
    assert {"torch", "peft", "reasoning-gym"} <= before.packages.keys()
    monkeypatch.setattr(identity, "version", lambda package: "99" if package == "reasoning-gym" else "1")
    changes = Identifier().identity(Kind.TRAIN, recipe).changes_since(before)
    assert f"reasoning-gym was {before.packages['reasoning-gym']} and is 99 now" in changes


@pytest.mark.parametrize(
    ("changed", "decides"),
    [
        ("training/arguments.py", True),
        ("adapters/hydra.py", True),
        ("comparison/worker.py", True),
        ("comparison/page.py", False),
        ("cli/compare.py", False),
        ("export/gguf.py", False),
    ],
)
def test_the_source_that_decides_counts(
    changed: str, decides: bool, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "loraplex"
    shutil.copytree(Path(loraplex.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(loraplex, "__file__", str(package / "__init__.py"))
    before = finished(recipe, tmp_path)
    with (package / changed).open("a") as source:
        source.write("# another line\n")
    after = job(recipe, tmp_path)
    assert (after != before) == decides
    assert why_again(after) == ("loraplex's own code has changed since" if decides else None) or not decides


def test_a_job_imports_no_source_that_does_not_count(warm_python: WarmPython) -> None:
    script = (
        "import json, sys\n"
        "ours = [module for name, module in sys.modules.items() if name.split('.')[0] == 'loraplex']\n"
        "print(json.dumps([module.__file__ for module in ours]))"
    )
    imported = {Path(file) for file in json.loads(warm_python.run("-c", script).stdout)}
    root = Path(loraplex.__file__).parent
    beside = {file.relative_to(root).as_posix() for file in imported - set(deciding_source())}
    # the name of a job's kind, and what identifies jobs, are read there; nothing of it computes
    assert beside <= {f"comparison/{name}.py" for name in ("__init__", "jobs", "identity", "fork_server", "workers")}
    assert root / "training/run.py" in imported & set(deciding_source())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_rate, "training.learning_rate was 0.01 and is 0.5 now"),
        (
            lambda recipe: replace(other_rate(recipe), seed=4),
            "seed was 0 and is 4 now and training.learning_rate was 0.01 and is 0.5 now",
        ),
        (
            lambda recipe: replace(other_rate(recipe), seed=4, peft={}, adapter=AdapterConfig(adapter="dora", r=3)),
            "adapter.adapter was 'lora' and is 'dora' now, and 4 more",
        ),
    ],
)
def test_a_changed_recipe_says_its_keys(
    change: Callable[[Recipe], Recipe], reason: str, recipe: Recipe, tmp_path: Path
) -> None:
    assert why_again(job(recipe, tmp_path)) is None
    finished(recipe, tmp_path)
    assert why_again(job(change(recipe), tmp_path)) == reason


def test_the_nearest_earlier_result_gives_the_reason(recipe: Recipe, tmp_path: Path) -> None:
    finished(replace(recipe, seed=7, adapter=AdapterConfig(adapter="dora")), tmp_path)
    finished(recipe, tmp_path)
    assert why_again(job(other_rate(recipe), tmp_path)) == "training.learning_rate was 0.01 and is 0.5 now"


def test_results_without_a_record_are_made_again_with_that_reason(recipe: Recipe, tmp_path: Path) -> None:
    before = finished(recipe, tmp_path)
    (before.folder / "identity.json").write_text("{")
    before.folder.rename(before.folder.with_name("lora-s0-0123abcd"))
    told = "an earlier version of loraplex has not written down what it was made from"
    assert why_again(job(recipe, tmp_path)) == told
