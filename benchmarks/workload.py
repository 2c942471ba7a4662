"""The work that all training contestants do: the rows, how they are batched, and the settings they share."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraplex.data.tokenization import TokenRow

MODEL = "embedded"
BATCH = 8
MAX_TOKENS = 256
THREADS = 2
ALPHA = 32
LEARNING_RATE = 2e-4
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
"""The sites of the HydraLoRA paper."""
TRAINING_FILE = "commonsense/train_balanced_1000each.jsonl.gz"

_FIRST_ROWS = 80
"""Of these the ones below MAX_TOKENS are taken, in whole batches: 72 rows."""


@dataclass(frozen=True)
class TrainingWork:
    """What one training contestant does, told to its process as JSON."""

    library: Literal["limit", "loraplex", "peft"]
    adapter: str | dict[str, Any] = "lora"
    """A preset's name; for loraplex also a mapping with options."""
    setting: Literal["bare", "padded", "best", "shipped"] = "padded"
    """`bare` is forward and backward alone; the others are whole steps under SFTTrainer, see `training_worker`."""
    rank: int = 16
    kinds: tuple[str, ...] = KINDS
    allocation: str | dict[str, Any] = "uniform"
    """Of loraplex: what opens and closes ranks while it trains."""
    objective: dict[str, Any] | None = None
    """Of loraplex, with its options."""
    length: int | None = None
    """Instead of the benchmark's rows, made-up ones: every batch is one row of this length and one of half of it."""


def training_rows(tokenizer: PreTrainedTokenizerBase, length: int | None = None) -> list[TokenRow]:
    """Return the rows as TRL takes them, in the order of training; the loss is on the completions."""
    return commonsense_rows(tokenizer) if length is None else made_up_rows(len(tokenizer), length)


def commonsense_rows(tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    """Return whole batches of the mixed commonsense rows below MAX_TOKENS.

    Raises:
        UserError: the benchmark sets are not on this machine.
    """
    from loraplex.data import DataOptions, read_examples, tokenize

    options = DataOptions(
        train=f"benchmark:{TRAINING_FILE}",
        prompt="### Instruction:\n{instruction}\n\n### Response:\n",
        completion="{output}",
    )
    rows = tokenize(read_examples(options, "train")[:_FIRST_ROWS], tokenizer).rows
    short = [row for row in rows if len(row["input_ids"]) < MAX_TOKENS]
    return short[: len(short) // BATCH * BATCH]


def made_up_rows(vocabulary: int, length: int, batches: int = 2) -> list[TokenRow]:
    """Return rows of random tokens, `length` and half of it in turn; the last eighth of each is the completion."""
    draw = random.Random(0)
    rows: list[TokenRow] = []
    for size in [length, length // 2] * batches:
        ids = [draw.randrange(vocabulary) for _ in range(size)]
        rows.append({"input_ids": ids, "completion_mask": [int(place >= size - size // 8) for place in range(size)]})
    return rows


def batch_size(work: TrainingWork) -> int:
    """Return how many rows a step takes."""
    return BATCH if work.length is None else 2


def batches(rows: list[TokenRow], size: int) -> list[list[TokenRow]]:
    """Return the rows in batches, in order."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
