"""The model card: what is known of the run is in it, and its lines of code run in its folder."""

import re
from pathlib import Path

import pytest
import yaml
from tests.conftest import write_tiny_recipe
from tests.warm_python import WarmPython

from loraplex.cli.main import main
from loraplex.export.base_lines import base_lines
from loraplex.export.exporting import ExportRequest, export
from loraplex.export.targets import TARGETS

pytestmark = pytest.mark.usefixtures("stock_in_process")


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the tiny model."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", str(write_tiny_recipe(folder, tiny_model)), "--quiet"]) == 0
    return folder / "run"


def card(run: Path, to: str, output: Path) -> str:
    export(ExportRequest(str(run), to, output))
    return (output / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("to", TARGETS)
def test_the_lines_that_load_it_run(run: Path, to: str, tmp_path: Path, stock_python: WarmPython) -> None:
    text = card(run, to, tmp_path / "out")
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "loraplex" not in lines
    bound = {"gguf": "names"}.get(to, "model")
    done = stock_python.run("-c", f"{lines}\nassert {bound}", cwd=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    # transformers announces removals to developers
    assert "UserWarning" not in done.stderr, done.stderr


def test_it_says_what_is_known_of_the_run(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    text = card(run, "vllm", tmp_path / "out")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata == {"library_name": "peft", "tags": ["lora", "loraplex"]}
    for line in (
        f"| base model | {tiny_model.name} |",
        "| method | lora (arXiv 2106.09685) |",
        "| training data | rows.jsonl |",
        "| training | 6 steps, batch size 4, learning rate 0.01, seed 0 |",
        "| sites | 14, rank 2 |",
        "| with the adapter | ",
        "| stock PEFT | ",
        "| the engines' reading rule | ",
        f"$ vllm serve {tiny_model} --enable-lora --max-lora-rank 8 --lora-modules adapter=.",
    ):
        assert line in text, line
    (trained,) = re.findall(r"\| trained parameters \| ([\d,]+) \(", text)
    assert int(trained.replace(",", "")) == 2 * 2 * (2 * 64 + 2 * 48 + 3 * 80)


def test_an_adapter_without_a_run_says_so(make, tmp_path: Path) -> None:
    text = card(make(stock=True), "peft", tmp_path / "out")
    assert "| training data | not recorded |" in text
    assert "| base revision | not recorded |" in text
    assert "Measured" not in text


def test_the_embedded_base_is_loaded_by_its_own_name(tmp_path: Path) -> None:
    assert 'load_model("embedded")' in base_lines("embedded")
    assert 'from_pretrained("owner/name"' in base_lines("owner/name")
