"""What needs no extra works without any, and what needs one says so in one line with the command that mends it."""

import re
import sys
from pathlib import Path

import pytest
from tests.bare import PYPROJECT, pretend_installed, run_bare

from loraplex import extras
from loraplex.cli.main import COMMANDS, main
from loraplex.data.builtin import read_builtin
from loraplex.data.options import DataOptions
from loraplex.data.sources import read_rows
from loraplex.data.texts import text_points
from loraplex.errors import UserError

LORAPLEX = (
    "torch>=2",
    "no-such-trainer<2,>=1; extra == 'train'",
    "pytest>=1; extra == 'train'",
    'No_Such.Charts[all]>=6; python_version > "3" and extra == "compare"',
    "loraplex[train]; extra == 'compare'",
    "pytest; extra == 'tasks'",
)


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loraplex whose extras are not all there."""
    monkeypatch.syspath_prepend(pretend_installed(tmp_path, *LORAPLEX))


@pytest.mark.usefixtures("pretended")
def test_what_is_missing_is_named_with_the_command_that_mends_it() -> None:
    with pytest.raises(UserError) as caught:
        extras.require("loraplex train", "train")
    assert str(caught.value) == (
        "loraplex train needs no-such-trainer, which is not installed: pip install 'loraplex[train]'"
    )
    with pytest.raises(
        UserError, match=r"x needs No_Such.Charts and no-such-trainer, which are not installed: .*compare"
    ):
        extras.require("x", "compare")
    with pytest.raises(UserError, match=r"x needs no-such-trainer, .* 'loraplex\[train\]'$"):
        extras.require("x", "train", "tasks")
    with pytest.raises(UserError, match=r"'loraplex\[train,compare\]'$"):
        extras.require("x", "train", "compare")
    extras.require("what is installed", "tasks")
    extras.require("what needs nothing")


@pytest.mark.usefixtures("pretended")
def test_a_command_whose_extra_is_missing_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "plan"):
        assert main([name, "recipe.yaml"]) == 1
        assert capsys.readouterr().err == (
            f"error: loraplex {name} needs no-such-trainer, which is not installed: pip install 'loraplex[train]'\n"
        )
        assert main([name, "--help"]) == 0
        capsys.readouterr()


def test_tasks_and_hub_data_sets_say_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ("no-tasks; extra == 'tasks'", "no-data; extra == 'train'")
    monkeypatch.syspath_prepend(pretend_installed(tmp_path, *needed))
    with pytest.raises(UserError, match=r"builtin:syllogism needs no-tasks, .* pip install 'loraplex\[tasks\]'"):
        read_builtin("syllogism", "train", 3, 0)
    with pytest.raises(UserError, match=r"'owner/name' needs no-data, .* pip install 'loraplex\[train\]'"):
        read_rows("owner/name", DataOptions(), "train")


def test_heads_left_to_the_rows_say_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"the {word} sat" for word in ("cat", "dog", "mouse", "horse")]
    # What else of the extra is missing does not matter.
    monkeypatch.syspath_prepend(pretend_installed(tmp_path, "no-curves; extra == 'analysis'"))
    text_points(texts)
    (tmp_path / "loraplex-9.dist-info/METADATA").write_text(
        "Metadata-Version: 2.4\nName: loraplex\nVersion: 9\nRequires-Dist: scikit-learn; extra == 'analysis'\n"
    )
    # The metadata of scikit-learn are on none of these paths.
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(
        UserError, match=r"to group prompts .* needs scikit-learn, .* pip install 'loraplex\[analysis\]'"
    ):
        text_points(texts)


def test_the_extras_of_the_commands_are_those_of_the_package() -> None:
    known = PYPROJECT["project"]["optional-dependencies"]
    assert {extra for command in COMMANDS.values() for extra in command.extras} <= known.keys()
    (everything,) = known["all"]
    assert set(re.search(r"\[(.*)\]", everything)[1].split(",")) == known.keys() - {"all", "dev"}


def test_every_help_page_needs_the_standard_library_alone() -> None:
    listed = "import sys; before = set(sys.modules)\nfrom loraplex.cli.main import COMMANDS, main\n"
    called = "for words in [[], *([name] for name in COMMANDS)]: assert main([*words, '--help']) == 0\n"
    names = "{name.partition('.')[0] for name in set(sys.modules) - before}"
    done = run_bare(f"{listed}{called}print({names} - sys.stdlib_module_names, file=sys.stderr)")
    assert (done.returncode, done.stderr) == (0, "{'loraplex'}\n")


CORE = """
import sys
from peft import get_peft_model
from transformers import Trainer, TrainingArguments
from loraplex import ALoRA, AdapterConfig, EchoLoRA, HeteroLoRA, load_adapter, load_model, print_trainable_parameters
from loraplex.cli.main import main

base = sys.argv[1]
row = {"input_ids": list(range(2, 10)), "labels": [-100] * 4 + list(range(6, 10)), "attention_mask": [1] * 8}
args = dict(max_steps=3, per_device_train_batch_size=2, report_to=[], disable_tqdm=True, use_cpu=True)
for number, changed in enumerate([
    {"adapter": "lora"}, {"adapter": "dora"}, {"adapter": "lora-xs"}, {"adapter": {"name": "hydra", "heads": 2}},
    {"adapter": "tied-tl6"}, {"adapter": "prolora"}, {"allocation": HeteroLoRA(share=0.5, batches=2, shortcuts=True)},
    {"allocation": ALoRA(rounds=1, in_steps=True, warmup_epochs=1, interval_epochs=1)},
    {"objective": EchoLoRA(sources=1, targets=(0,), ramp=1)},
]):
    config = AdapterConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **changed)
    model = get_peft_model(load_model(base), config)
    print_trainable_parameters(model)
    Trainer(model, TrainingArguments(f"run-{number}", **args), train_dataset=[row] * 8).train()
    model.save_pretrained(f"adapter-{number}")
    load_adapter(load_model(base), f"adapter-{number}")
assert main(["generate", "adapter-0", "--prompt", "the cat", "--max-new-tokens", "1"]) == 0
print("done")
"""


def test_the_tuner_and_generate_need_no_extra(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_bare(CORE, str(tiny_model))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "done"
