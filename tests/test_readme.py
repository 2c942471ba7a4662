"""What the README shows runs as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from peft import PeftModel

from loraplex.adapters.registry import Axis, Deployed
from loraplex.cli.main import COMMANDS, cli
from loraplex.methods import REGISTRY
from loraplex.models.loading import load_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = [line.removeprefix("$ ").partition("#")[0].strip() for line in README.splitlines() if line.startswith("$ ")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_runs_and_its_adapter_loads_in_peft(tmp_path: Path) -> None:
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line]) <= 5
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True)
    loaded = PeftModel.from_pretrained(load_model("embedded"), str(tmp_path / "my-adapter"))
    assert loaded.peft_config["default"].use_dora


@pytest.mark.parametrize("line", [line for line in SHOWN if line.startswith("loraplex ")])
def test_the_commands_it_shows_exist_with_their_options(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    context = command.make_context(name, list(arguments), resilient_parsing=False)
    assert context.command is command


def test_it_shows_every_command() -> None:
    assert {shlex.split(line)[1] for line in SHOWN if line.startswith("loraplex ")} == set(COMMANDS)


def test_the_make_targets_it_names_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert named
    assert named <= targets


def test_the_recipes_and_documents_it_names_exist() -> None:
    for path in re.findall(r"\]\(([^)h#][^)]*)\)|(recipes/\S+\.yaml)", README):
        assert (ROOT / (path[0] or path[1])).exists(), path


def test_a_method_is_ready_when_the_registry_has_it() -> None:
    ready = re.findall(r"^\| (\S+) \|.*\| ready \|$", README, re.MULTILINE)
    objectives = {method.name for method in REGISTRY.members(Axis.OBJECTIVE) if method.deployed is Deployed.OWN}
    assert {name.lower() for name in ready} == set(REGISTRY.presets) | objectives
