"""Items without options: how surprised a model is by the right answer, −log p(answer | prompt) / its tokens."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from loraplex.data.examples import Example
from loraplex.data.tokenization import completion_ids, prompt_ids
from loraplex.errors import UserError
from loraplex.evaluation.log_probs import ScoredItem, completion_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Loss:
    """A mean of n items with its standard error s / √n; 0 for a single item, which says nothing about it."""

    value: float
    standard_error: float
    items: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Loss:
        """Return the mean of `values`, which must not be empty."""
        assert values, "a loss needs items"
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
        return cls(mean, math.sqrt(variance / len(values)), len(values))


@dataclass(frozen=True)
class LossItem:
    """One item as it was scored."""

    source: str
    task: str
    tokens: int
    """Of the right answer, its end token not counted."""
    log_prob: float
    """log p(answer | prompt), summed over these tokens."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return -self.log_prob / max(1, self.tokens)


@dataclass(frozen=True)
class LossScores:
    """The scored items; every item counts the same, however long its answer."""

    items: tuple[LossItem, ...]

    @property
    def overall(self) -> Loss:
        """The mean over all items."""
        return Loss.of([item.loss for item in self.items])

    @property
    def per_task(self) -> Mapping[str, Loss]:
        """The mean of every task, in the order in which they first appear."""
        groups: dict[str, list[float]] = defaultdict(list)
        for item in self.items:
            groups[item.task].append(item.loss)
        return {task: Loss.of(values) for task, values in groups.items()}

    def records(self) -> list[dict[str, Any]]:
        """Return one record an item, to be written as JSON; it has a loss and is neither right nor wrong."""
        return [{**vars(item), "loss": item.loss} for item in self.items]


def score_answer_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> LossScores:
    """Score the right answer of every example by its log-likelihood after the prompt; the end token does not count.

    `batch_size` is the largest number of items in a forward pass.

    Raises:
        UserError: an answer has no tokens.
    """
    answers = completion_ids([example.completion for example in examples], tokenizer)
    for example, answer in zip(examples, answers, strict=True):
        if not answer:
            raise UserError(f"{example.source}: the right answer is empty, so it has no loss; leave the row out")
    scored = [
        ScoredItem(prompt, [answer]) for prompt, answer in zip(prompt_ids(examples, tokenizer), answers, strict=True)
    ]
    log_probs = completion_log_probs(model, scored, batch_size=batch_size, progress=progress)
    return LossScores(
        tuple(
            LossItem(example.source, example.task, len(answer), value)
            for example, answer, (value,) in zip(examples, answers, log_probs, strict=True)
        )
    )
