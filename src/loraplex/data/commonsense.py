"""The eight commonsense tasks in the wording of LLM-Adapters (arXiv 2304.01933): option texts, and the label protocol.

A row's `instruction` is "<lead>: <question>", a blank line, "Answer1: <text> Answer2: <text> ...", and a last part
"Answer format: answer1/answer2/..."; its `choices` are the labels alone, where it has any: the published files do not.
"""

from __future__ import annotations

from loraplex.data.examples import Example, Row
from loraplex.data.options import Split

# Every label that the protocol looks for in an answer, by task; social_i_qa is searched for answer4 and answer5 too.
LABELS: dict[str, tuple[str, ...]] = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
}

# The published prompts, byte for byte (repository AGI-Edgerunners/LLM-Adapters, commit 8166572): indented as in its
# source, with two spaces at the end of the first line and a blank line of 16 spaces in training, one and none in
# evaluation.
_INDENT = " " * 16
_REQUEST = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TRAIN_PROMPT = (
    f"{_REQUEST}  \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n{_INDENT}### Response:\n{_INDENT}"
)
TEST_PROMPT = f"{_REQUEST} \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n\n{_INDENT}### Response:\n{_INDENT}"

_FORMAT = "Answer format: "
_LEAD_END = ": "


def is_commonsense(row: Row) -> bool:
    """Return whether `row` is one of the eight tasks in this wording."""
    instruction = row.fields.get("instruction")
    return row.fields.get("task") in LABELS and isinstance(instruction, str) and _FORMAT in instruction


def read_as_options(row: Row) -> Example:
    """Return the question with the texts of its options: `Question: ...`, `Answer:`, and ` <option>` to complete it."""
    question, texts = parse_instruction(row)
    choices = tuple(f" {text}" for text in texts)
    answer = _answer(row)
    return Example(f"Question: {question}\nAnswer:", choices[answer], choices, answer)


def read_as_labels(row: Row, split: Split) -> Example:
    """Return the instruction in the published prompt of `split`, to be completed by "the correct answer is <label>"."""
    template = TRAIN_PROMPT if split == "train" else TEST_PROMPT
    output, label = row.text("output"), row.text("answer")
    if not output.endswith(label):
        raise row.error(f"field 'output' has to end with the label '{label}', not be {output!r}")
    start = output.removesuffix(label)
    prompt = template.format(instruction=row.text("instruction"))
    return Example(prompt, output, tuple(start + choice for choice in _labels(row)), _answer(row))


def parse_instruction(row: Row) -> tuple[str, tuple[str, ...]]:
    """Return the question of a row and the texts of its options; boolq's options are its labels.

    Raises:
        UserError: the instruction is not worded as expected.
    """
    instruction, labels = row.text("instruction"), _labels(row)
    body, found, _ = instruction.rpartition(_FORMAT)
    if not found:
        raise row.error(f"the instruction has no '{_FORMAT.strip()}' part; use data.format alpaca for such rows")
    body = body.strip()
    texts = labels
    if labels != LABELS["boolq"]:
        body, texts = _split_options(row, body, labels)
    _, found, question = body.partition(_LEAD_END)
    if not found or not question.strip():
        raise row.error("the instruction has no question after its lead; it has to read '<lead>: <question>'")
    return question.strip(), texts


def _split_options(row: Row, body: str, labels: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    r"""Cut `body` at "\n\nAnswer1:", " Answer2:", ..., the first of them being the last such place in the text."""
    markers = [f"{label.capitalize()}:" for label in labels]
    rest, found, options = body.rpartition(f"\n\n{markers[0]}")
    texts = []
    for marker in markers[1:]:
        # piqa separates its options by a blank line, the other tasks by a space.
        text, has_marker, options = options.partition(marker)
        if not found or not has_marker:
            raise row.error(f"the instruction names no option '{marker}'; its labels are {', '.join(labels)}")
        texts.append(text.strip())
    return rest, (*texts, options.strip())


def _labels(row: Row) -> tuple[str, ...]:
    labels = row.fields.get("choices")
    if labels is None:
        # the published files name them in the instruction alone
        _, found, listed = row.text("instruction").rpartition(_FORMAT)
        labels = listed.strip().split("/") if found else row.value("choices")
    if not isinstance(labels, list) or len(labels) < 2:
        raise row.error(f"field 'choices' has to be a list of at least two labels, not {labels!r}")
    return tuple(str(label) for label in labels)


def _answer(row: Row) -> int:
    label, labels = row.text("answer"), _labels(row)
    if label not in labels:
        raise row.error(f"the answer '{label}' is none of the labels {', '.join(labels)}")
    return labels.index(label)
