"""Tokenized rows from the cache: equal to those made anew, found again by content alone, never a damaged file."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loraplex.data import Example, Message, tokenization, tokenize, tokenize_once
from loraplex.errors import UserError


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path))
    monkeypatch.setattr(tokenization, "WORTH_KEEPING", 2)
    return tmp_path / "rows"


EXAMPLES = [Example("the cat", " sat"), Example("the cat sat on the", " mat"), Example("a", " the cat sat sat sat")]


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_equal_to_rows_made_anew_also_the_second_time(tokenizer: Any, kept: Path, loss_on: Any) -> None:
    expected = tokenize(EXAMPLES, tokenizer, 4, loss_on)
    assert expected.truncated or expected.dropped
    assert tokenize_once(EXAMPLES, tokenizer, 4, loss_on) == expected
    (file,) = kept.iterdir()
    stamp = file.stat().st_mtime_ns
    assert tokenize_once(EXAMPLES, tokenizer, 4, loss_on) == expected
    assert [file.stat().st_mtime_ns for file in kept.iterdir()] == [stamp]


def test_whatever_changes_the_rows_changes_the_file(tokenizer: Any, kept: Path) -> None:
    tokenize_once(EXAMPLES, tokenizer)
    tokenize_once(EXAMPLES, tokenizer, 5)
    tokenize_once(EXAMPLES, tokenizer, loss_on="all")
    tokenize_once(EXAMPLES[::-1], tokenizer)
    tokenize_once([*EXAMPLES[:2], Example("a", " the cat sat sat mat")], tokenizer)
    assert len(list(kept.iterdir())) == 5
    tokenizer.add_tokens(["sat on"])
    added = tokenize_once(EXAMPLES, tokenizer)
    assert len(list(kept.iterdir())) == 6
    assert added == tokenize(EXAMPLES, tokenizer)


def test_chat_turns_and_plain_text_of_the_same_words_differ() -> None:
    chat = Example((Message("user", "the cat"),), " sat")
    assert tokenization._key([chat], []) != tokenization._key([Example("the cat", " sat")], [])


def test_a_damaged_file_is_made_anew(tokenizer: Any, kept: Path) -> None:
    expected = tokenize_once(EXAMPLES, tokenizer)
    (file,) = kept.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert tokenize_once(EXAMPLES, tokenizer) == expected
    assert tokenize_once(EXAMPLES, tokenizer) == expected


def test_a_cache_that_cannot_be_written_is_a_warning(tokenizer: Any, kept: Path) -> None:
    kept.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="not kept for next time"):
        assert tokenize_once(EXAMPLES, tokenizer) == tokenize(EXAMPLES, tokenizer)


def test_nothing_is_kept_where_caching_is_switched_off(tokenizer: Any, kept: Path) -> None:
    from datasets import disable_caching, enable_caching

    disable_caching()
    try:
        assert tokenize_once(EXAMPLES, tokenizer) == tokenize(EXAMPLES, tokenizer)
    finally:
        enable_caching()
    assert not kept.exists()


def test_rows_that_leave_nothing_are_refused_with_the_reason(tokenizer: Any, kept: Path) -> None:
    with pytest.raises(UserError, match="max_length 1 leaves nothing"):
        tokenize_once(EXAMPLES[:2], tokenizer, 1)


def test_bars_are_as_they_were(tokenizer: Any, kept: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from datasets.utils import are_progress_bars_disabled

    before = are_progress_bars_disabled()
    tokenize_once(EXAMPLES, tokenizer)
    assert are_progress_bars_disabled() == before
    assert capfd.readouterr().err == ""
