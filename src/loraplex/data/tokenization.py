"""From examples to token ids, the same way for training and for scoring.

Prompt and completion are tokenized apart and joined as ids. A tokenizer run over the joined text may merge across the
border, and then the tokens a model learns are not the ones it is asked to score or to continue from; apart, the border
is the same in training, option scoring and generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

from loraplex.data.examples import Example, Message
from loraplex.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenRow(TypedDict):
    """One row as TRL's trainers take it: a mask of 1 marks the tokens that carry loss."""

    input_ids: list[int]
    completion_mask: list[int]


@dataclass(frozen=True)
class Tokenized:
    """Tokenized rows, and what the length limit did to them."""

    rows: list[TokenRow]
    # Rows that were cut, those that were dropped not counted.
    truncated: int
    # Rows left out because nothing of their completion was left.
    dropped: int


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    loss_on: Literal["completion", "all"] = "completion",
) -> Tokenized:
    """Return prompt + completion + end token of every example as ids.

    A row longer than `max_length` tokens loses its end, as in TRL; a row that loses its whole completion is dropped.

    Raises:
        UserError: no row is left.
    """
    prompts = prompt_ids(examples, tokenizer)
    completions = completion_ids([example.completion for example in examples], tokenizer)
    text_end, chat_end = [_end_token(tokenizer)], None
    rows: list[TokenRow] = []
    truncated = dropped = 0
    for example, prompt, completion in zip(examples, prompts, completions, strict=True):
        end = text_end
        if not isinstance(example.prompt, str):
            end = chat_end = chat_end or turn_end(tokenizer)
        learnt = completion if completion[-len(end) :] == end else completion + end
        if max_length is not None and len(prompt) + len(learnt) > max_length:
            learnt = learnt[: max(0, max_length - len(prompt))]
            if not learnt:
                dropped += 1
                continue
            truncated += 1
        mask = [int(loss_on == "all")] * len(prompt) + [1] * len(learnt)
        rows.append({"input_ids": prompt + learnt, "completion_mask": mask})
    if not rows:
        shortest = min(map(len, prompts), default=0)
        raise UserError(
            f"max_length {max_length} leaves nothing of the completion of any of the {len(examples)} rows; "
            f"the shortest prompt has {shortest} tokens, so set it above that"
        )
    return Tokenized(rows, truncated, dropped)


def prompt_ids(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of every prompt, with the tokenizer's start token if it has one; never empty.

    Chat messages go through the tokenizer's own chat template, up to where the assistant begins to speak.

    Raises:
        UserError: there are chat messages but no chat template.
    """
    is_text = [isinstance(example.prompt, str) for example in examples]
    texts = [
        example.prompt if isinstance(example.prompt, str) else _render(example.prompt, tokenizer, example.source)
        for example in examples
    ]
    # A chat template writes its special tokens itself.
    plain = iter(_ids([text for text, plain in zip(texts, is_text, strict=True) if plain], tokenizer, special=True))
    chats = iter(_ids([text for text, plain in zip(texts, is_text, strict=True) if not plain], tokenizer))
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else _end_token(tokenizer)
    found = []
    for plain_row in is_text:
        ids = next(plain if plain_row else chats)
        # Some tokenizers end every text; a prompt goes on.
        if len(ids) > 1 and plain_row and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        found.append(ids or [start])
    return found


def completion_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of every completion, without start or end token."""
    return _ids(texts, tokenizer)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end the assistant's turn in the chat template, without the white space after them.

    They are the end token in most templates; where a template writes none, the end token is taken.
    """
    probe = "probe"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": probe}]
    rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    after = rendered.rpartition(probe)[2].strip()
    return _ids([after], tokenizer)[0] if after else [_end_token(tokenizer)]


def _render(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    if not tokenizer.chat_template:
        raise UserError(f"{source}: chat messages need a chat template, and the tokenizer of this model has none")
    turns = [asdict(message) for message in messages]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, special: bool = False) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UserError(
            "the tokenizer of this model has no end token: set tokenizer.eos_token, or, for an encoder, model.head to "
            "classification"
        )
    return end
