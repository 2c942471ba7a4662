"""The forms a row may have in its file, each a function from row to example, and how a form is recognized."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence

from loraplex.data.commonsense import LABELS, is_commonsense, read_as_labels, read_as_options
from loraplex.data.examples import Example, Message, Row
from loraplex.data.options import DataOptions, Split
from loraplex.errors import UserError

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def recognize(row: Row, options: DataOptions) -> str:
    """Return the name of the form that `row` has.

    Raises:
        UserError: its fields fit none.
    """
    if options.prompt is not None:
        return "template"
    for name, needed in _SIGNATURES.items():
        if needed <= row.fields.keys():
            return "commonsense" if name == "alpaca" and is_commonsense(row) else name
    wanted = "; ".join(f"{name}: {', '.join(sorted(needed))}" for name, needed in _SIGNATURES.items())
    raise row.error(
        f"the fields {row.names()} fit no known form ({wanted}); rename them or set data.prompt (--prompt '{{field}}')"
    )


def reader_for(first: Row, options: DataOptions, split: Split) -> Callable[[Row], Example]:
    """Return the function that makes examples of the rows of a source that begins with `first`.

    Rows of instructions are looked at one by one when the form is to be recognized: in a set mixed from several tasks
    some have the commonsense wording.

    Raises:
        UserError: the fields of `first` fit no form.
    """
    if options.format != "auto":
        return reader(options.format, options, split)
    form = recognize(first, options)
    if form not in ("alpaca", "commonsense"):
        return reader(form, options, split)
    strict = form == "commonsense"

    def read(row: Row) -> Example:
        # a set in the commonsense wording has it throughout its tasks: a row without it is a mistake
        wording = is_commonsense(row) or (strict and row.fields.get("task") in LABELS)
        return read_as_options(row) if wording else _alpaca(row, options.chat)

    return read


def reader(form: str, options: DataOptions, split: Split) -> Callable[[Row], Example]:
    """Return the function that makes an example of a row of `form`."""
    readers: dict[str, Callable[[Row], Example]] = {
        "completion": _completion,
        "messages": _messages,
        "alpaca": lambda row: _alpaca(row, options.chat),
        "choices": _choices,
        "template": lambda row: _template(row, options),
        "commonsense": read_as_options,
        "commonsense-labels": lambda row: read_as_labels(row, split),
    }
    return readers[form]


_SIGNATURES: Mapping[str, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "completion": frozenset({"prompt", "completion"}),
    "choices": frozenset({"question", "choices"}),
    "alpaca": frozenset({"instruction", "output"}),
}


def _completion(row: Row) -> Example:
    return Example(row.text("prompt"), row.text("completion"))


def _messages(row: Row) -> Example:
    turns = row.value("messages")
    if not isinstance(turns, list) or not turns:
        raise row.error(f"field 'messages' has to be a list of messages, not {turns!r}")
    messages = [_message(row, turn) for turn in turns]
    *before, last = messages
    if last.role != "assistant":
        raise row.error(f"the last message has role '{last.role}'; it has to be the assistant's, which is learnt")
    if not before:
        raise row.error("there is no message before the assistant's; a prompt is needed")
    return Example(tuple(before), last.content)


def _message(row: Row, turn: object) -> Message:
    if isinstance(turn, dict):
        role, content = turn.get("role"), turn.get("content")
        if isinstance(role, str) and isinstance(content, str):
            return Message(role, content)
    raise row.error(f"a message has to be {{'role': text, 'content': text}}, not {turn!r}")


def _alpaca(row: Row, chat: bool) -> Example:
    instruction, output, context = row.text("instruction"), row.text("output"), row.fields.get("input") or ""
    if chat:
        prompt = f"{instruction}\n\n{context}" if context else instruction
    else:
        prompt = (ALPACA_WITH_INPUT if context else ALPACA).format(instruction=instruction, input=context)
    if not row.fields.get("choices"):
        return Example(prompt, output)
    texts = [str(text) for text in _list(row, "choices")]
    answer = answer_index(row, row.value("answer"), texts)
    if not output.endswith(texts[answer]):
        raise row.error(f"field 'output' has to end with the right choice '{texts[answer]}', not be {output!r}")
    start = output.removesuffix(texts[answer])
    return Example(prompt, output, tuple(start + text for text in texts), answer)


def _choices(row: Row) -> Example:
    found = row.value("choices")
    labels: Sequence[object] = ()
    # ARC and its like keep the options as {"text": [...], "label": ["A", ...]}.
    if isinstance(found, dict):
        nested = Row(found, f"{row.source}, choices")
        texts, labels = _list(nested, "text"), _list(nested, "label")
    else:
        texts = _list(row, "choices")
    name = "answerKey" if "answerKey" in row.fields and "answer" not in row.fields else "answer"
    answer = answer_index(row, row.value(name), [str(text) for text in texts], [str(label) for label in labels])
    choices = tuple(f" {str(text).strip()}" for text in texts)
    return Example(f"Question: {row.text('question').strip()}\nAnswer:", choices[answer], choices, answer)


def _template(row: Row, options: DataOptions) -> Example:
    assert options.prompt is not None
    prompt = fill("prompt", options.prompt, row)
    if options.completion is not None:
        return Example(prompt, fill("completion", options.completion, row))
    choices = tuple(fill("choices", choice, row) for choice in options.choices)
    answer = answer_index(row, row.value(options.answer), [choice.strip() for choice in choices])
    second = None if options.second is None else fill("second", options.second, row)
    return Example(prompt, choices[answer], choices, answer, second=second)


def fill(name: str, template: str, row: Row) -> str:
    """Return `template` with every {field} replaced by that field of `row`; {{ and }} are braces.

    Raises:
        UserError: the template is malformed, or the row lacks a field.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"data.{name} is no template ({error}): {template!r}; a brace is written {{{{ or }}}}"
        ) from error
    for _, field, spec, conversion in parts:
        if spec or conversion:
            raise UserError(
                f"data.{name} has more than a name in the braces of '{field}': {template!r}; leave only that"
            )
    return "".join(text + ("" if field is None else str(row.value(field))) for text, field, _, _ in parts)


def answer_index(row: Row, answer: object, texts: Sequence[str], labels: Sequence[str] = ()) -> int:
    """Return the index of the right one of `texts`; `answer` is its index from 0, its text, its label or a letter.

    Raises:
        UserError: it is none of them.
    """
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(texts):
            return answer
    elif isinstance(answer, str):
        stripped = answer.strip()
        for names in ([text.strip() for text in texts], labels, string.ascii_uppercase[: len(texts)]):
            if stripped in names:
                return list(names).index(stripped)
    raise row.error(
        f"the answer {answer!r} is none of the {len(texts)} choices ({', '.join(texts)}); "
        "give an index from 0, a letter from A, or the text"
    )


def _list(row: Row, name: str) -> list[object]:
    found = row.value(name)
    if not isinstance(found, list) or len(found) < 2:
        raise row.error(f"field '{name}' has to be a list of at least two options, not {found!r}")
    return found
