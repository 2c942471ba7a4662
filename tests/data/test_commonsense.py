"""The commonsense files: option texts come out of the instructions, and the published prompts are byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest

from loraplex.data import DataOptions, Example, read_examples
from loraplex.data.commonsense import LABELS, parse_instruction, read_as_labels, read_as_options
from loraplex.data.examples import Row
from loraplex.data.forms import recognize
from loraplex.data.sources import benchmark_root, read_json
from loraplex.errors import UserError

# One row of each way to write options, from the wording of LLM-Adapters.
ARC = {
    "task": "ARC-Easy",
    "instruction": "Please choose the correct answer to the question: Why: heat?\n\nAnswer1: a b Answer2: c "
    "Answer3: d: e\n\nAnswer format: answer1/answer2/answer3",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
    "choices": ["answer1", "answer2", "answer3"],
}
PIQA = {
    "task": "piqa",
    "instruction": "Please choose the correct solution to the question: Open a tin\n\nSolution1: pull it\n\n"
    "Solution2: push  it\n\nAnswer format: solution1/solution2",
    "output": "the correct answer is solution1",
    "answer": "solution1",
    "choices": ["solution1", "solution2"],
}
WINOGRANDE = {
    "task": "winogrande",
    "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: Ian met Al, "
    "and _ left.\n\nOption1: Ian Option2: Al Answer format: option1/option2",
    "output": "the correct answer is option2",
    "answer": "option2",
    "choices": ["option1", "option2"],
}
BOOLQ = {
    "task": "boolq",
    "instruction": "Please answer the following question with true or false, question: is it so?\n\n"
    "Answer format: true/false",
    "output": "the correct answer is false",
    "answer": "false",
    "choices": ["true", "false"],
}


@pytest.mark.parametrize(
    ("row", "question", "options", "answer"),
    [
        (ARC, "Why: heat?", ("a b", "c", "d: e"), 1),
        (PIQA, "Open a tin", ("pull it", "push  it"), 0),
        (WINOGRANDE, "Ian met Al, and _ left.", ("Ian", "Al"), 1),
        (BOOLQ, "is it so?", ("true", "false"), 1),
    ],
)
def test_option_texts(row: dict[str, Any], question: str, options: tuple[str, ...], answer: int) -> None:
    example = read_as_options(Row(row, "file:1"))
    choices = tuple(f" {option}" for option in options)
    assert example == Example(f"Question: {question}\nAnswer:", choices[answer], choices, answer)


def test_the_form_is_recognized(tmp_path: Path) -> None:
    assert recognize(Row(ARC, "file:1"), DataOptions()) == "commonsense"
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ARC) + "\n")
    (example,) = read_examples(DataOptions(train=str(path)), "train")
    assert (example.task, example.completion) == ("ARC-Easy", " c")


TRAIN = (
    b"Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
    b"\n"
    b"                ### Instruction:\n"
    b"                INSTRUCTION\n"
    b"                \n"
    b"                ### Response:\n"
    b"                "
)
TEST = (
    b"Below is an instruction that describes a task. Write a response that appropriately completes the request. \n"
    b"\n"
    b"                ### Instruction:\n"
    b"                INSTRUCTION\n"
    b"\n"
    b"                ### Response:\n"
    b"                "
)


@pytest.mark.parametrize(("split", "expected"), [("train", TRAIN), ("test", TEST)])
def test_the_published_prompts_byte_for_byte(split: Any, expected: bytes) -> None:
    example = read_as_labels(Row(ARC, "file:1"), split)
    assert isinstance(example.prompt, str)
    assert example.prompt.encode() == expected.replace(b"INSTRUCTION", ARC["instruction"].encode())  # type: ignore[attr-defined]
    assert example.completion == "the correct answer is answer2"
    assert example.choices[2] == "the correct answer is answer3"
    assert example.answer == 1


def test_the_published_files_name_their_labels_in_the_instruction_alone() -> None:
    published = {key: value for key, value in ARC.items() if key not in ("choices", "task", "id")}
    ours, theirs = (read_as_labels(Row(fields, "file:1"), "train") for fields in (ARC, published))
    assert (theirs.prompt, theirs.completion, theirs.answer) == (ours.prompt, ours.completion, ours.answer)
    assert theirs.choices == ours.choices
    with pytest.raises(UserError, match="field 'choices' is missing"):
        read_as_labels(Row({**published, "instruction": "Which?"}, "file:1"), "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": "What?"}, "has no 'Answer format:' part"),
        ({"instruction": "Q: x\n\nAnswer1: a Answer format: y"}, "names no option 'Answer2:'"),
        ({"instruction": "Q: x Answer1: a Answer2: b Answer3: c Answer format: y"}, "names no option"),
        ({"answer": "answer9"}, "the answer 'answer9' is none of the labels answer1, answer2, answer3"),
        ({"choices": "answer1"}, "a list of at least two labels"),
        ({"instruction": None}, "field 'instruction' is missing"),
    ],
)
def test_a_row_worded_otherwise_names_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        read_as_options(Row({**ARC, **change}, "file:7"))
    assert str(raised.value).startswith("file:7: ")
    assert message in str(raised.value)


def files() -> list[Path]:
    root = benchmark_root()
    return sorted((root / "commonsense").rglob("*.jsonl.gz")) if root else []


@pytest.mark.skipif(not files(), reason="the commonsense sets are absent: set LORAPLEX_DATA")
def test_every_row_of_every_file_is_rebuilt_from_its_parts() -> None:
    seen = 0
    for path in files():
        for row in read_json(path, path.name):
            question, texts = parse_instruction(row)
            labels, task = row.fields["choices"], row.fields["task"]
            assert isinstance(labels, list)
            assert task in LABELS
            body = (
                ""
                if task == "boolq"
                else " ".join(f"{a.capitalize()}: {b}" for a, b in zip(labels, texts, strict=True))
            )
            rebuilt = f"{question} {body} Answer format: {'/'.join(labels)}"
            instruction = " ".join(row.text("instruction").split())
            assert instruction.endswith(": " + " ".join(rebuilt.split())), row.source
            assert all(texts)
            # No option swallowed the next one's marker.
            assert not any(f"{label.capitalize()}:" in text for label in labels for text in (question, *texts))
            read_as_labels(row, "train")
            seen += 1
    assert seen == 44745


def test_a_mixed_set_has_the_wording_row_by_row(tmp_path: Path) -> None:
    plain = {"task": "rte", "instruction": "Does it?", "output": "yes", "answer": "yes", "choices": ["yes", "no"]}
    sums = {"task": "gsm8k", "instruction": "2 + 2?", "input": "", "output": "4", "choices": []}
    path = tmp_path / "rows.jsonl"
    for rows in ([plain, ARC, sums, BOOLQ], [BOOLQ, sums, ARC, plain]):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = {example.task: example for example in read_examples(DataOptions(test=str(path)), "test")}
        assert found["ARC-Easy"].choices == (" a b", " c", " d: e")
        assert found["rte"].choices == ("yes", "no")
        assert found["gsm8k"].choices == ()
        assert found["boolq"].prompt == "Question: is it so?\nAnswer:"


def test_a_row_without_the_wording_of_its_set_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(BOOLQ) + "\n" + json.dumps({**ARC, "instruction": "Why: heat?"}) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the instruction has no 'Answer format:' part"):
        read_examples(DataOptions(test=str(path)), "test")


def test_what_is_asked_is_the_rows_own_instruction(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [ARC, {"instruction": "Add.", "input": "2 2", "output": "4"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [example.asked for example in read_examples(DataOptions(test=str(path)), "test")] == [
        ARC["instruction"],
        "Add.\n\n2 2",
    ]
    template = DataOptions(test=str(path), prompt="Do: {instruction}", completion="{output}")
    assert read_examples(template, "test")[1].asked == "Do: Add."
    chat = DataOptions(test=str(path), prompt="Do: {instruction}", completion="{output}", chat=True)
    assert read_examples(chat, "test")[1].asked == "Do: Add."
