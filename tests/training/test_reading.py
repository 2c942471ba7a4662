"""Recipes: what they may say, and one line for everything that can be wrong with them."""

from pathlib import Path

import pytest
import yaml

from loraplex import AdapterConfig
from loraplex.cli.main import main
from loraplex.comparison.comparison_recipe import read_comparison
from loraplex.errors import UserError
from loraplex.training.reading import (
    known_paths,
    parse_overrides,
    read_recipe,
    recipe_from_mapping,
    recipe_to_yaml,
    resolve_key,
)

EVERY = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
COMPARISONS = [path for path in EVERY if "\narms:" in path.read_text(encoding="utf-8")]
RECIPES = [path for path in EVERY if path not in COMPARISONS]


def message(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 1) -> str:
    """Run `loraplex train` in this process and return the one line that it fails with."""
    assert main(["train", *arguments]) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("output: run\ndata: {train: rows.jsonl}\n")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training: {learning_rat: 1}", "unknown key 'training.learning_rat'. Did you mean 'training.learning_rate'?"),
        ("learning_rate: 1", "unknown key 'learning_rate'. Did you mean 'training.learning_rate'?"),
        ("adapter: {rank_patern: {}}", "unknown key 'adapter.rank_patern'. Did you mean 'adapter.rank_pattern'?"),
        ("training: {batch_size: eight}", "training.batch_size is 'eight', expected a valid integer"),
        ("training: {batch_size: true}", "training.batch_size is True, expected a valid integer"),
        ("training: {batch_size: 0}", "training.batch_size is 0, expected greater than 0"),
        ("training: {learning_rate: .nan}", "training.learning_rate is nan, expected a finite number"),
        ("training: {trainer_args: 3}", "training.trainer_args is 3, expected an object"),
        ("model: {dtype: float16}", "model.dtype is 'float16', expected 'bfloat16', 'float32' or 'auto'"),
        ("model: 7", "model.name is 7, expected a valid string"),
        ("adapter: {r: many}", "adapter.r is 'many', expected a valid integer"),
        ("adapter: {bias: most}", "adapter.bias is 'most', expected 'none', 'all' or 'lora_only'"),
        ("training: {load_best: true}", "training.load_best needs rows to validate on"),
        ("data: {format: alpca}", "Did you mean 'alpaca'?"),
        ("training: {epochs: 1\n", "not valid YAML"),
        ("seed: 1\nseed: 2", "line 1: not valid YAML: the key 'seed' stands twice"),
        ("- seed", "a recipe is a mapping of keys to values, this is a list"),
        ("seed: 1", "output is missing: give it in the recipe or as --output"),
    ],
)
def test_a_recipe_that_is_wrong(text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text if text.startswith(("-", "seed")) else f"output: run\n{text}")
    line = message(capsys, str(path))
    assert expected in line
    assert str(path) in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--training.batch-siz", "4"], "unknown key '--training.batch_siz'. Did you mean 'training.batch_size'?"),
        (["--batch-siz=4"], "unknown key '--batch_siz'. Did you mean 'training.batch_size'?"),
        (["--batch-size", "4"], "--batch_size is ambiguous: write --training.batch_size or --evaluation.batch_size"),
        (["--max-length", "four"], "--training.max_length is 'four', expected a valid integer"),
        (["--batch_size"], "--batch_size needs a value: --batch_size VALUE"),
        (["--batch_size", "--seed", "1"], "--batch_size needs a value"),
        (["--batch_size", "[1"], "--batch_size: not valid YAML"),
    ],
)
def test_an_override_that_is_wrong(
    overrides: list[str], expected: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in message(capsys, str(recipe), *overrides)


def test_a_missing_recipe_names_the_nearest_file(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = recipe.with_name("recpie.yaml")
    assert message(capsys, str(missing)) == f"error: there is no recipe '{missing}'. Did you mean '{recipe}'?"


@pytest.mark.parametrize("arguments", [[], ["--seed", "1"], ["a.yaml", "b.yaml"]])
def test_a_command_line_without_one_recipe(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "give one recipe" in message(capsys, *arguments, status=2)


def test_a_short_key_that_two_sections_have_is_refused() -> None:
    with pytest.raises(UserError, match=r"--rows is ambiguous: write --data\.rows or --evaluation\.rows"):
        resolve_key("rows", ["data.rows", "evaluation.rows"])


def test_overrides_win_and_may_be_short(recipe: Path) -> None:
    overrides = ["--adapter", "dora", "--r=4", "--model", "gpt2", "--data", "other.jsonl", "--learning-rate", "3e-4"]
    read = read_recipe(recipe, [*overrides, "--training.trainer_args.adam_beta2", "0.99", "--seed", "7"])
    assert read.adapter == AdapterConfig(adapter="dora", r=4)
    assert (read.model.name, read.data.train, read.seed) == ("gpt2", "other.jsonl", 7)
    assert read.training.learning_rate == 3e-4
    assert read.training.trainer_args == {"adam_beta2": 0.99}


def test_a_whole_section_may_be_overridden(recipe: Path) -> None:
    read = read_recipe(recipe, ["--model", "{name: gpt2, dtype: float32}", "--adapter", "{name: hydra, heads: 2}"])
    assert (read.model.name, read.model.dtype) == ("gpt2", "float32")
    # no key of the section is called so: it is what `adapter: VALUE` means
    assert read.adapter.to_dict()["adapter"] == {"name": "hydra", "heads": 2}


def test_a_pattern_with_dots_is_one_key(recipe: Path) -> None:
    read = read_recipe(recipe, ["--adapter.rank_pattern.layers.0.q_proj", "3", "--adapter.rank_pattern.v_proj", "2"])
    assert read.adapter == AdapterConfig(rank_pattern={"layers.0.q_proj": 3, "v_proj": 2})


def test_a_value_may_be_a_list_or_negative(recipe: Path) -> None:
    assert parse_overrides(["--data.train", "[a, b]", "--x", "-1"]) == {"data.train": ["a", "b"], "x": -1}
    assert read_recipe(recipe, ["--data.train", "[a, b]"]).data.sources("train") == ("a", "b")


def test_some_sections_may_be_one_value() -> None:
    read = recipe_from_mapping({"output": "run", "model": "gpt2", "adapter": "dora", "data": "rows.jsonl"})
    assert (read.model.name, read.adapter, read.data.train) == ("gpt2", AdapterConfig(adapter="dora"), "rows.jsonl")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_written_as_it_is_read(path: Path, tmp_path: Path) -> None:
    read = read_recipe(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe_to_yaml(read))
    assert read_recipe(copy) == read


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_carries_its_command(path: Path) -> None:
    assert f"loraplex train recipes/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_a_comparison_is_read_and_carries_its_command(path: Path) -> None:
    assert f"loraplex compare recipes/{path.name}" in path.read_text()
    assert len(read_comparison(path).arms) > 1
    with pytest.raises(UserError, match=f"is the recipe of a comparison: loraplex compare {path}"):
        read_recipe(path)


def test_every_key_is_documented_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert [path for path in known_paths() if f"  --{path} " not in shown.replace("\n", " ")] == []


def test_the_known_keys_are_the_ones_that_are_written() -> None:
    written = yaml.safe_load(recipe_to_yaml(recipe_from_mapping({"output": "run"})))
    sections = {name: value for name, value in written.items() if isinstance(value, dict)}
    free = {"adapter", "peft"}
    sections = {name: value for name, value in sections.items() if name not in free}
    paths = {f"{name}.{key}" for name, section in sections.items() for key in section}
    paths |= written.keys() - sections.keys() - {"adapter"}
    assert paths == {path for path in known_paths() if not path.startswith("adapter.")}


@pytest.mark.parametrize("section", ["training", "evaluation"])
def test_a_section_without_a_short_form_is_no_value(section: str, recipe: Path) -> None:
    with pytest.raises(UserError, match=f"{section} is 3: '{section}' is a section, give its keys"):
        recipe_from_mapping({"output": "run", section: 3})
    with pytest.raises(UserError, match=f"--{section}: '{section}' is a section, give its keys"):
        read_recipe(recipe, [f"--{section}", "3"])
    with pytest.raises(UserError, match=f"unknown key '--{section}.nme'"):
        read_recipe(recipe, [f"--{section}", "{nme: 3}"])
