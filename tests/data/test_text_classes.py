"""Texts and pairs as the tokenizer joins them, cut where they are too long, with the class as a number."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from loraplex.data import DataOptions, Example, tokenize_texts
from loraplex.data.examples import Row
from loraplex.data.forms import reader
from loraplex.errors import UserError
from loraplex.models.loading import load_tokenizer

CLASSES = ("no", "yes")


@pytest.fixture
def tokenizer(tiny_encoder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_encoder))


def example(first: str, second: str | None = None, answer: int = 1) -> Example:
    return Example(first, CLASSES[answer], CLASSES, answer, second=second, source="rows:1")


def test_a_pair_has_two_types_of_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    (row,) = tokenize_texts([example("the cat", "sat", answer=0)], tokenizer, CLASSES).rows
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["[CLS]", "the", "cat", "[SEP]", "sat", "[SEP]"]
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert row["labels"] == 0


def test_the_longer_text_of_a_pair_is_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    found = tokenize_texts([example("the " * 9, "cat sat"), example("the", "cat")], tokenizer, CLASSES, max_length=8)
    words = [tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in found.rows]
    assert words[0] == ["[CLS]", "the", "the", "the", "[SEP]", "cat", "sat", "[SEP]"]
    assert words[1] == ["[CLS]", "the", "[SEP]", "cat", "[SEP]"]
    assert (found.truncated, found.dropped) == (1, 0)


def test_a_template_reads_a_pair() -> None:
    options = DataOptions(prompt="{a}!", second="{b}?", choices=("no", "yes"), answer="label")
    found = reader("template", options, "train")(Row({"a": "the cat", "b": "sat", "label": 1}, "rows:1"))
    assert (found.prompt, found.second, found.answer, found.choices) == ("the cat!", "sat?", 1, ("no", "yes"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Example("the", "cat", source="rows:3"), "rows:3: the row has no options, the classes are no, yes"),
        (Example("the", "no", ("yes", "no"), 1, source="rows:3"), "the row has the options yes, no"),
    ],
)
def test_rows_of_other_classes_are_refused(row: Example, message: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError) as raised:
        tokenize_texts([example("the"), row], tokenizer, CLASSES)
    assert message in str(raised.value)


def test_a_tokenizer_without_a_separator_joins_no_pairs(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"no token that separates two texts: write both into data\.prompt"):
        tokenize_texts([example("the", "cat")], load_tokenizer(str(tiny_model)), CLASSES)
