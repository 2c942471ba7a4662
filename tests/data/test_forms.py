"""Every form of row becomes the example it stands for, and a row that does not fit names its place."""

import json
from pathlib import Path
from typing import Any

import pytest

from loraplex.data import DataOptions, Example, Message, read_examples
from loraplex.errors import UserError

SST2 = {"prompt": "Review: {sentence1}\nSentiment:", "choices": (" negative", " positive"), "answer": "label"}


def read(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> list[Example]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(DataOptions(train=str(path), **options), "train")


def one(tmp_path: Path, row: dict[str, Any], **options: Any) -> Example:
    (example,) = read(tmp_path, row, **options)
    return example


def test_prompt_and_completion(tmp_path: Path) -> None:
    example = one(tmp_path, {"prompt": "a", "completion": " b", "task": "t", "other": 1})
    assert example == Example("a", " b", task="t", source=f"{tmp_path / 'rows.jsonl'}:1")


def test_messages_learn_the_last_turn(tmp_path: Path) -> None:
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
    example = one(tmp_path, {"messages": [{"role": role, "content": content} for role, content in turns]})
    assert example.prompt == tuple(Message(*turn) for turn in turns[:-1])
    assert example.completion == "b"


@pytest.mark.parametrize("context", [{}, {"input": ""}, {"input": None}, {"input": "some text"}])
def test_alpaca(tmp_path: Path, context: dict[str, str]) -> None:
    example = one(tmp_path, {"instruction": "do", "output": "done", **context})
    assert isinstance(example.prompt, str)
    assert example.prompt.endswith("\n\n### Response:\n")
    assert "### Instruction:\ndo\n\n" in example.prompt
    assert ("### Input:\nsome text\n\n" in example.prompt) == bool(context.get("input"))
    assert (example.completion, example.choices) == ("done", ())


def test_alpaca_as_chat_asks_without_the_template(tmp_path: Path) -> None:
    row = {"instruction": "do", "input": "this", "output": "done"}
    assert one(tmp_path, row, chat=True).prompt == (Message("user", "do\n\nthis"),)


def test_alpaca_with_choices_can_be_scored(tmp_path: Path) -> None:
    row = {"instruction": "?", "output": "it is no", "answer": "no", "choices": ["yes", "no"]}
    example = one(tmp_path, row)
    assert (example.choices, example.answer) == (("it is yes", "it is no"), 1)


@pytest.mark.parametrize("answer", [1, "B", "two", " two "])
def test_multiple_choice_takes_index_letter_and_text(tmp_path: Path, answer: object) -> None:
    example = one(tmp_path, {"question": "1 + 1?", "choices": ["one", "two", "three"], "answer": answer})
    assert example.prompt == "Question: 1 + 1?\nAnswer:"
    assert (example.choices, example.answer, example.completion) == ((" one", " two", " three"), 1, " two")


def test_a_text_that_looks_like_a_letter_is_a_text(tmp_path: Path) -> None:
    assert one(tmp_path, {"question": "?", "choices": ["B", "A"], "answer": "A"}).answer == 1


def test_multiple_choice_with_labels(tmp_path: Path) -> None:
    row = {"question": "?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    assert one(tmp_path, row).completion == " y"


@pytest.mark.parametrize("label", [0, 1])
def test_template(tmp_path: Path, label: int) -> None:
    example = one(tmp_path, {"sentence1": "good {fun}", "label": label}, **SST2)
    assert example.prompt == "Review: good {fun}\nSentiment:"
    assert (example.choices, example.answer) == ((" negative", " positive"), label)
    assert example.completion == (" negative", " positive")[label]


def test_template_with_a_completion_and_braces(tmp_path: Path) -> None:
    example = one(tmp_path, {"input": "x", "target": "y"}, prompt="{{{input}}} =", completion=" {target}")
    assert (example.prompt, example.completion, example.choices) == ("{x} =", " y", ())


def test_a_template_wins_over_the_fields(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "c"}
    assert one(tmp_path, row, prompt="<{prompt}>", completion="{completion}").prompt == "<p>"


def test_chat_asks_a_text_prompt_as_the_user(tmp_path: Path) -> None:
    example = one(tmp_path, {"sentence1": "fun", "label": 1}, chat=True, **SST2)
    assert example.prompt == (Message("user", "Review: fun\nSentiment:"),)
    assert (example.completion, example.choices) == ("positive", ("negative", "positive"))


def test_the_task_of_a_row_wins_over_that_of_the_options(tmp_path: Path) -> None:
    first, second = read(
        tmp_path, {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "task": "own"}, task="ours"
    )
    assert (first.task, second.task) == ("ours", "own")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "a", "x": 1}, {"format": "completion"}, "The row has 'prompt', 'x'"),
        ({"prompt": "a", "completion": None}, {}, "field 'completion' is missing"),
        ({"prompt": "a", "completions": "b"}, {"format": "completion"}, "Did you mean 'completions'?"),
        ({"prompt": "a", "completion": 3}, {}, "field 'completion' has to be text, not 3"),
        ({"text": "a"}, {}, "the fields 'text' fit no known form"),
        ({"messages": []}, {}, "has to be a list of messages"),
        ({"messages": ["hello"]}, {}, "a message has to be {'role': text, 'content': text}, not 'hello'"),
        ({"messages": [{"role": "user", "content": "a"}]}, {}, "the last message has role 'user'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, {}, "no message before the assistant's"),
        ({"question": "?", "choices": ["a", "b"]}, {}, "field 'answer' is missing"),
        ({"question": "?", "choices": ["a", "b"], "answer": 2}, {}, "the answer 2 is none of the 2 choices (a, b)"),
        ({"question": "?", "choices": ["a", "b"], "answer": -1}, {}, "the answer -1 is none of"),
        ({"question": "?", "choices": ["a", "b"], "answer": "C"}, {}, "the answer 'C' is none of"),
        ({"question": "?", "choices": ["a", "b"], "answer": True}, {}, "the answer True is none of"),
        ({"question": "?", "choices": ["a"], "answer": 0}, {}, "a list of at least two options"),
        ({"sentence": "x", "label": 0}, SST2, "field 'sentence1' is missing. Did you mean 'sentence'?"),
        ({"instruction": "a", "output": "b", "answer": "x", "choices": ["x", "y"]}, {}, "has to end with the right"),
    ],
)
def test_a_row_that_does_not_fit_names_its_place(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as raised:
        one(tmp_path, row, **options)
    text = str(raised.value)
    assert text.startswith(f"{tmp_path / 'rows.jsonl'}:1: ")
    assert message in text
    assert "\n" not in text


def test_a_later_row_names_its_own_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:3: field 'completion' is missing"):
        read(tmp_path, *[{"prompt": "a", "completion": "b"}] * 2, {"prompt": "a"}, max_train=1)


@pytest.mark.parametrize("template", ["{", "}", "{a!r}", "{a:>3}"])
def test_a_broken_template_is_named(tmp_path: Path, template: str) -> None:
    with pytest.raises(UserError, match=r"^data\.prompt "):
        one(tmp_path, {"a": "x"}, prompt=template, completion="y")
