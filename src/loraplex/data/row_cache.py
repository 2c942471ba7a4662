"""Tokenized rows kept by content: the same texts under the same tokenizer are tokenized once."""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loraplex.cache import cache_dir, write_whole
from loraplex.data.examples import Example
from loraplex.data.tokenization import Tokenized, TokenRow, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Counted up whenever `tokenize` makes other rows of the same texts.
VERSION = 1
# Fewer rows are tokenized sooner than a file is found.
WORTH_KEEPING = 1000


def tokenize_once(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    loss_on: Literal["completion", "all"] = "completion",
) -> Tokenized:
    """Return what `tokenize` returns, from the user's cache where the same rows were tokenized before.

    The key is a hash of every prompt and completion, of the tokenizer's own definition, and of the two options. A file
    that cannot be read is made anew; one that cannot be written is a warning.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or len(examples) < WORTH_KEEPING:
        return tokenize(examples, tokenizer, max_length, loss_on)
    definition = [backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    path = cache_dir() / "rows" / f"{_key(examples, [definition, max_length, loss_on])}.npz"
    try:
        return _read(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        found = tokenize(examples, tokenizer, max_length, loss_on)
    try:
        write_whole(path, lambda temporary: _write(temporary, found))
    except OSError as error:
        warnings.warn(f"tokenized rows are not kept for next time: {error}", stacklevel=2)
    return found


def _key(examples: Sequence[Example], settings: list[Any]) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, settings], sort_keys=True, default=str).encode())
    for example in examples:
        prompt = example.prompt if isinstance(example.prompt, str) else [asdict(turn) for turn in example.prompt]
        digest.update(json.dumps([prompt, example.completion]).encode() + b"\n")
    return digest.hexdigest()


def _read(path: Path) -> Tokenized:
    with np.load(path, allow_pickle=False) as file:
        borders = np.cumsum(file["lengths"])[:-1]
        ids, masks = (np.split(file[name], borders) for name in ("ids", "mask"))
        counts = file["counts"]
    rows: list[TokenRow] = [
        {"input_ids": row.tolist(), "completion_mask": mask.tolist()} for row, mask in zip(ids, masks, strict=True)
    ]
    return Tokenized(rows, truncated=int(counts[0]), dropped=int(counts[1]))


def _write(path: Path, tokenized: Tokenized) -> None:
    np.savez(
        path,
        ids=np.concatenate([np.asarray(row["input_ids"], dtype=np.int32) for row in tokenized.rows]),
        mask=np.concatenate([np.asarray(row["completion_mask"], dtype=np.int8) for row in tokenized.rows]),
        lengths=np.asarray([len(row["input_ids"]) for row in tokenized.rows], dtype=np.int64),
        counts=np.asarray([tokenized.truncated, tokenized.dropped], dtype=np.int64),
    )
