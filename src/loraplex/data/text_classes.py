"""From examples to the token ids of a model with a classification head: one text or a pair, and the class as a number.

A pair is joined as the tokenizer joins pairs, with its own separators and token types.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from loraplex.data.examples import Example
from loraplex.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Texts(TypedDict):
    input_ids: list[int]
    labels: int
    """Index of the right class."""


class ClassRow(_Texts, total=False):
    """One row as `transformers.Trainer` takes it."""

    token_type_ids: list[int]
    """Where the tokenizer tells the texts of a pair apart."""


@dataclass(frozen=True)
class ClassRows:
    """Tokenized rows, and what the length limit did to them."""

    rows: list[ClassRow]
    truncated: int
    """Rows that were cut."""
    dropped: int = 0
    """Never any: what is left of a text still has its class."""


def tokenize_texts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    classes: Sequence[str],
    max_length: int | None = None,
) -> ClassRows:
    """Return the texts of every example as ids, and its class as an index into `classes`.

    Of a pair longer than `max_length` tokens the longer text loses its end.

    Raises:
        UserError: when a row has other options than `classes`, is a chat, or is a pair that the tokenizer cannot join.
    """
    labels = [_label(example, classes) for example in examples]
    firsts = [str(example.prompt) for example in examples]
    pairs = [example.second for example in examples]
    if None not in pairs and tokenizer.sep_token is None:
        raise UserError(
            "the tokenizer of this model has no token that separates two texts: write both into data.prompt"
        )
    encoded = _encode(firsts, pairs, tokenizer)
    long = [index for index, row in enumerate(encoded) if max_length is not None and len(row["input_ids"]) > max_length]
    if long:
        cut = _encode(
            [firsts[i] for i in long], [pairs[i] for i in long], tokenizer, truncation=True, max_length=max_length
        )
        for index, row in zip(long, cut, strict=True):
            encoded[index] = row
    rows: list[ClassRow] = [{**row, "labels": label} for row, label in zip(encoded, labels, strict=True)]  # type: ignore[typeddict-item]
    return ClassRows(rows, len(long))


def _label(example: Example, classes: Sequence[str]) -> int:
    names = [choice.strip() for choice in example.choices]
    if example.answer is None or names != list(classes):
        has = f"the options {', '.join(names)}" if names else "no options"
        raise UserError(
            f"{example.source}: the row has {has}, the classes are {', '.join(classes)}: give all rows these, in this "
            "order (data.choices)"
        )
    if not isinstance(example.prompt, str):
        raise UserError(f"{example.source}: a classification head reads texts, not chats: leave data.chat out")
    return example.answer


def _encode(
    firsts: Sequence[str], seconds: Sequence[str | None], tokenizer: PreTrainedTokenizerBase, **how: Any
) -> list[dict[str, list[int]]]:
    """Return the tokenizer's columns row by row, without the attention mask: nothing is padded yet."""
    texts: list[Any] = [list(firsts)] if None in seconds else [list(firsts), list(seconds)]
    columns = tokenizer(*texts, return_attention_mask=False, verbose=False, **how)
    return [{name: columns[name][index] for name in columns} for index in range(len(firsts))]
