"""What the README shows runs as it stands there."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from peft import PeftModel
from tests.warm_python import WarmPython

from loraplex.adapters.registry import Axis
from loraplex.cli.main import COMMANDS
from loraplex.methods import REGISTRY
from loraplex.models.loading import load_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = [line.removeprefix("$ ").partition("#")[0].strip() for line in README.splitlines() if line.startswith("$ ")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names under which a Markdown page's headings are linked to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_the_python_examples_run_and_their_adapters_load_in_peft(tmp_path: Path, stock_python: WarmPython) -> None:
    shortest, under_trl = blocks("python")
    assert len([line for line in shortest.splitlines() if line]) <= 5
    for example, dora in ((shortest, True), (under_trl, False)):
        done = stock_python.run("-c", example, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        loaded = PeftModel.from_pretrained(load_model("embedded"), str(tmp_path / "my-adapter"))
        assert loaded.peft_config["default"].use_dora == dora


@pytest.mark.parametrize("line", [line for line in SHOWN if line.startswith("loraplex ")])
def test_the_commands_it_shows_exist_with_their_options(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    importlib.import_module(COMMANDS[name].module).parser(name).parse(arguments)


def test_it_shows_every_command() -> None:
    assert {shlex.split(line)[1] for line in SHOWN if line.startswith("loraplex ")} == set(COMMANDS)


def test_the_make_targets_it_names_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert named
    assert named <= targets


def test_the_recipes_and_documents_it_names_exist() -> None:
    for path in re.findall(r"\]\(([^)h#][^)]*)\)|(recipes/\S+\.yaml)", README):
        name, _, heading = (path[0] or path[1]).partition("#")
        assert (ROOT / name).exists(), path
        assert not heading or heading in anchors(ROOT / name), path


def test_the_page_on_data_has_every_set_that_recipes_read() -> None:
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    recipes = [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "benchmarks/studies").glob("*.yaml")]
    folders = {name for path in recipes for name in re.findall(r"benchmark:(\S+/)", path.read_text(encoding="utf-8"))}
    assert folders
    assert {folder for folder in folders if f"`{folder}" not in page} == set()


def test_its_table_has_the_methods_of_the_registry() -> None:
    table = README[README.index("| method | axis |") :].partition("\n\n")[0]
    named = re.findall(r"^\| (\S+) \| (?:adapter|allocation|objective)", table, re.MULTILINE)
    usual = {"uniform", "plain"}
    others = {method.name for axis in (Axis.ALLOCATION, Axis.OBJECTIVE) for method in REGISTRY.members(axis)}
    assert {name.lower() for name in named} == set(REGISTRY.presets) | others - usual


def test_its_ratios_are_those_of_the_benchmarks() -> None:
    def comparison(name: str, over: str, quantity: str) -> dict[str, float]:
        results = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
        (found,) = [
            entry
            for entry in results["comparisons"]
            if (entry["of"], entry["over"], entry["quantity"]) == ("ours", over, quantity)
        ]
        return found

    for over in ("peft-best", "peft-padded"):
        found = [comparison(f"training-{method}", over, "speed") for method in ("lora", "dora")]
        assert " | ".join("{median:.1f} × ({low:.1f} – {high:.1f})".format(**ratio) for ratio in found) in README
    found = [comparison(f"training-{method}", "peft-best", "memory") for method in ("lora", "dora")]
    assert " | ".join("{median:.2f} ×".format(**ratio) for ratio in found) in README
    harness = comparison("evaluation", "lm-eval-best", "speed")
    assert "{median:.1f} times ({low:.1f} – {high:.1f})".format(**harness) in README
