"""The keys on help pages: those of the dataclasses, each with a line that explains it."""

from dataclasses import fields

import pytest
from peft import PeftConfig

from loraplex import AdapterConfig, HeteroLoRA
from loraplex.cli.arguments import Parser, add_keys, in_words_of, section
from loraplex.cli.keys import FILE, as_json, collected_keys, known_key, known_keys
from loraplex.cli.main import main
from loraplex.documentation import Key, documented
from loraplex.errors import UserError


def test_the_file_is_what_the_dataclasses_say() -> None:
    """Where this fails: `python -m loraplex.cli.keys` writes the file."""
    assert FILE.read_text(encoding="utf-8") == as_json(collected_keys())
    assert known_keys() == collected_keys()


def test_every_key_is_explained() -> None:
    assert [key.path for keys in known_keys().values() for key in keys if not key.doc] == []


def test_the_help_of_a_comparison_has_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for title, paths in {
        "Keys of a comparison": ["arms", "seeds", "budget"],
        "Keys of an arm": ["arms.NAME.training", "arms.NAME.compute_of"],
    }.items():
        assert f"{title}: " in shown
        assert all(f"--{path} " in shown for path in paths)
    assert "--training.learning_rate " not in shown


def test_fields_of_bases_come_with_their_lines_and_those_of_peft_do_not() -> None:
    found = {key.path: key for key in documented(HeteroLoRA)}
    assert list(found) == [entry.name for entry in fields(HeteroLoRA)]
    assert found["shortcut_r"].doc == "Rank of a shortcut that `rank_pattern` does not name."
    assert all(key.doc for key in found.values())
    own = {key.path for key in documented(AdapterConfig)}
    assert own == {entry.name for entry in fields(AdapterConfig)} - {entry.name for entry in fields(PeftConfig)}


def test_a_key_has_type_choices_default_and_bound() -> None:
    assert known_key("evaluation.batch_size") == Key(
        "evaluation.batch_size", "Test rows per forward pass.", "integer", default=16, least=1
    )
    assert known_key("model.head").choices == ("language", "classification")
    assert known_key("output").required
    assert known_key("adapter.r").default == 8


def test_options_are_made_from_keys() -> None:
    flags = {"--rows": "data.max_test", "--part": "data.choices", "--chat": "data.chat", "--form": "data.format"}
    parser = Parser("loraplex x", "")
    add_keys(parser, flags, {"--rows": {"default": 4}})
    assert section(parser.parse([]), "data") == {"max_test": 4, "choices": (), "chat": False, "format": "auto"}
    given = parser.parse(["--rows", "7", "--part", " a", "--part", " b", "--chat", "--form", "alpaca"])
    assert section(given, "data") == {"max_test": 7, "choices": (" a", " b"), "chat": True, "format": "alpaca"}


def test_an_error_names_the_option_where_it_names_a_key() -> None:
    with pytest.raises(UserError) as caught, in_words_of({"--limit": "data.max_test"}):
        raise UserError("set data.max_test to 3 or less, or data.seed; see data.max_test_per_task")
    assert str(caught.value) == "set --limit to 3 or less, or data.seed; see data.max_test_per_task"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["eval", "none", "--data", "rows.jsonl", "--format", "template"],
            "--format is 'template', but --prompt is not set; write it, with {field} for a field",
        ),
        (["heads", "rows.jsonl", "--limit", "0"], "--limit is 0; it has to be at least 1, or absent for all rows"),
    ],
)
def test_a_command_says_what_to_do_in_its_own_options(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert capsys.readouterr().err == f"error: {line}\n"
