"""From examples to token ids, the same way for training and for scoring.

Prompt and completion are tokenized apart and joined as ids. A tokenizer run over the joined text may merge across the
border, and then the tokens a model learns are not the ones it is asked to score or to continue from; apart, the border
is the same in training, option scoring and generation.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np

from loraplex.cache import cache_dir
from loraplex.data.examples import Example, Message
from loraplex.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Counted up whenever `tokenize` makes other rows of the same texts.
VERSION = 1
# Fewer rows are tokenized sooner than a file is found.
WORTH_KEEPING = 1000
_COLUMNS = ("input_ids", "completion_mask", "cut")
_Row = tuple[list[int], list[int], bool]


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
    rows = list(_token_rows(examples, tokenizer, max_length, loss_on))
    return _tokenized(rows, examples, tokenizer, max_length)


def tokenize_once(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    loss_on: Literal["completion", "all"] = "completion",
) -> Tokenized:
    """Return what `tokenize` returns; `datasets` keeps many rows in the user's cache, so that the next run finds them.

    They are found by a hash of every prompt and completion, of the tokenizer's own definition, and of the two options.
    Nothing is kept where caching is switched off (`datasets.disable_caching`). A file that cannot be read is made anew;
    one that cannot be written is a warning.

    Raises:
        UserError: no row is left.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or len(examples) < WORTH_KEEPING:
        return tokenize(examples, tokenizer, max_length, loss_on)
    from datasets import is_caching_enabled

    if not is_caching_enabled():
        return tokenize(examples, tokenizer, max_length, loss_on)
    definition = [backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    key = _key(examples, [definition, max_length, loss_on])
    file = cache_dir() / "rows" / f"{key}.arrow"

    def columns(numbers: list[int]) -> dict[str, list[Any]]:
        found = _token_rows([examples[number] for number in numbers], tokenizer, max_length, loss_on)
        return dict(zip(_COLUMNS, map(list, zip(*found, strict=True)), strict=True))

    try:
        rows = _kept(file, key, len(examples), columns)
    except OSError as error:
        warnings.warn(f"tokenized rows are not kept for next time: {error}", stacklevel=2)
        return tokenize(examples, tokenizer, max_length, loss_on)
    return _tokenized(rows, examples, tokenizer, max_length)


def _kept(file: Path, key: str, count: int, columns: Callable[[list[int]], dict[str, list[Any]]]) -> list[_Row]:
    """Return the rows in `file`, which `datasets` makes of `columns` where it is not there or cannot be read."""
    from datasets import Dataset, Features, List, Value

    features = Features(input_ids=List(Value("int32")), completion_mask=List(Value("int8")), cut=Value("bool"))
    file.parent.mkdir(parents=True, exist_ok=True)
    numbers = Dataset.from_dict({"number": range(count)})
    how: dict[str, Any] = {"batched": True, "input_columns": "number", "remove_columns": "number", "features": features}
    with _without_bars():
        try:
            rows = numbers.map(columns, **how, cache_file_name=str(file), new_fingerprint=key)
        except UserError:
            raise
        except (OSError, ValueError):
            # Arrow says of a damaged file that it is one or the other. What else is wrong is so the second time too.
            file.unlink(missing_ok=True)
            rows = numbers.map(columns, **how, cache_file_name=str(file), new_fingerprint=key)
    ids, masks, cut = (rows.data.column(name) for name in features)
    return list(zip(_lists(ids), _lists(masks), cut.to_pylist(), strict=True))


def _lists(column: Any) -> list[list[int]]:
    """Return an Arrow column of lists as Python's: through NumPy, which takes a tenth of the time of `to_pylist`."""
    lists = []
    for chunk in column.chunks:
        borders = np.cumsum(chunk.value_lengths().to_numpy())[:-1]
        lists += [part.tolist() for part in np.split(chunk.flatten().to_numpy(), borders)]
    return lists


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


def _key(examples: Sequence[Example], settings: list[Any]) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, settings], sort_keys=True, default=str).encode())
    for example in examples:
        prompt = example.prompt if isinstance(example.prompt, str) else [asdict(turn) for turn in example.prompt]
        digest.update(json.dumps([prompt, example.completion]).encode() + b"\n")
    return digest.hexdigest()


def _token_rows(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    loss_on: Literal["completion", "all"],
) -> Iterator[_Row]:
    """Yield ids and mask of every example, and whether the length limit cut it; ids are empty where none are left."""
    prompts = prompt_ids(examples, tokenizer)
    completions = completion_ids([example.completion for example in examples], tokenizer)
    text_end, chat_end = [_end_token(tokenizer)], None
    for example, prompt, completion in zip(examples, prompts, completions, strict=True):
        end = text_end
        if not isinstance(example.prompt, str):
            end = chat_end = chat_end or turn_end(tokenizer)
        learnt = completion if completion[-len(end) :] == end else completion + end
        cut = max_length is not None and len(prompt) + len(learnt) > max_length
        if cut:
            assert max_length is not None
            learnt = learnt[: max(0, max_length - len(prompt))]
        mask = [int(loss_on == "all")] * len(prompt) + [1] * len(learnt)
        yield (prompt + learnt, mask, cut) if learnt else ([], [], cut)


def _tokenized(
    rows: Sequence[_Row], examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Tokenized:
    whole: list[TokenRow] = [{"input_ids": ids, "completion_mask": mask} for ids, mask, _ in rows if ids]
    if not whole:
        shortest = min(map(len, prompt_ids(examples, tokenizer)), default=0)
        raise UserError(
            f"max_length {max_length} leaves nothing of the completion of any of the {len(examples)} rows; "
            f"the shortest prompt has {shortest} tokens, so set it above that"
        )
    return Tokenized(whole, sum(cut for ids, _, cut in rows if ids), len(rows) - len(whole))


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
