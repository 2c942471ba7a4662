"""Tokens of prompt, completion and end, the mask over them, and what a length limit does."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loraplex.data import Example, Message, tokenize
from loraplex.data.tokenization import completion_ids, prompt_ids, turn_end
from loraplex.errors import UserError
from loraplex.models.loading import load_tokenizer

# Ends a turn with two tokens of its own, and writes a line break after them.
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}!!<pad>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def smollm() -> Any:
    return load_tokenizer("embedded")


def test_prompt_and_completion_are_tokenized_apart(tokenizer: Any) -> None:
    # "the cat" is one merge over the border when it is tokenized in one piece.
    example = Example("the c", "at sat")
    (row,) = tokenize([example], tokenizer).rows
    prompt, completion = (tokenizer(text)["input_ids"] for text in ("the c", "at sat"))
    assert row["input_ids"] == [*prompt, *completion, tokenizer.eos_token_id]
    assert row["input_ids"] != [*tokenizer("the cat sat")["input_ids"], tokenizer.eos_token_id]
    assert row["completion_mask"] == [0] * len(prompt) + [1] * (len(completion) + 1)
    # Option scoring sees the same tokens.
    assert prompt_ids([example], tokenizer) == [prompt]
    assert completion_ids(["at sat"], tokenizer) == [completion]


def test_the_end_token_comes_once(tokenizer: Any) -> None:
    rows = tokenize([Example("a", "b"), Example("a", "b<end>"), Example("a", "")], tokenizer).rows
    assert rows[0] == rows[1]
    assert [row["input_ids"].count(tokenizer.eos_token_id) for row in rows] == [1, 1, 1]


def test_loss_on_all(tokenizer: Any) -> None:
    (row,) = tokenize([Example("the cat", " sat")], tokenizer, loss_on="all").rows
    assert row["completion_mask"] == [1] * len(row["input_ids"])


def test_a_length_limit_cuts_the_end_and_counts(tokenizer: Any) -> None:
    examples = [Example("q" * 3, "wxyz"), Example("q" * 3, "w"), Example("q" * 9, "w")]
    whole = tokenize(examples, tokenizer)
    cut = tokenize(examples, tokenizer, max_length=5)
    assert (whole.truncated, whole.dropped) == (0, 0)
    assert (cut.truncated, cut.dropped) == (1, 1)
    assert cut.rows[0]["input_ids"] == whole.rows[0]["input_ids"][:5]
    assert cut.rows[0]["completion_mask"] == [0, 0, 0, 1, 1]
    assert cut.rows[1] == whole.rows[1]
    assert len(cut.rows) == 2


def test_a_prompt_as_long_as_the_limit_leaves_nothing(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"^max_length 3 leaves nothing .* of the 2 rows; the shortest prompt has 3 "):
        tokenize([Example("qqq", "w"), Example("qqqq", "w")], tokenizer, max_length=3)


def test_an_empty_prompt_gets_a_start(tokenizer: Any) -> None:
    (row,) = tokenize([Example("", "b")], tokenizer).rows
    assert row["completion_mask"][0] == 0
    assert row["input_ids"][0] == tokenizer.eos_token_id


def test_a_tokenizer_that_adds_start_and_end(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<pad>"
    ends = [("<pad>", 1), ("<end>", 0)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A <end>", special_tokens=ends)
    (row,) = tokenize([Example("q", "w")], tokenizer).rows
    assert tokenizer.decode(row["input_ids"]) == "<pad>qw<end>"
    assert row["completion_mask"] == [0, 0, 1, 1]


def test_chat_messages_use_the_template_and_its_own_end(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    tokenizer.bos_token = None
    examples = [Example("plain", "w"), Example((Message("user", "hi"),), "ho"), Example("x", "y")]
    rows = tokenize(examples, tokenizer).rows
    texts = [tokenizer.decode(row["input_ids"]) for row in rows]
    assert texts == ["plainw<end>", "[user]hi!!<pad>\n[assistant]ho!!<pad>", "xy<end>"]
    learnt = [token for token, mask in zip(rows[1]["input_ids"], rows[1]["completion_mask"], strict=True) if mask]
    assert tokenizer.decode(learnt) == "ho!!<pad>"


def test_chat_without_a_template_names_the_row(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"^f:3: chat messages need a chat template"):
        tokenize([Example((Message("user", "hi"),), "ho", source="f:3")], tokenizer)


def test_smollm_renders_what_its_template_renders(smollm: Any) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (row,) = tokenize([Example((Message("user", "hi"),), "ho")], smollm).rows
    # The template goes on with a line break, which is not the assistant's.
    assert smollm.decode(row["input_ids"]) == smollm.apply_chat_template(messages, tokenize=False).rstrip()
    assert turn_end(smollm) == [smollm.eos_token_id] == [smollm.pad_token_id]
    learnt = [token for token, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
    assert smollm.decode(learnt) == "ho<|im_end|>"
