"""Multiple choice without generation: the option a model finds likeliest, summed or per character."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from loraplex.data.examples import Example
from loraplex.data.tokenization import completion_ids, prompt_ids
from loraplex.errors import UserError, nearest
from loraplex.evaluation.log_probs import ScoredItem, completion_log_probs
from loraplex.evaluation.results import Accuracies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Normalize = Literal["sum", "characters"]


@dataclass(frozen=True)
class OptionItem:
    """One item as it was scored."""

    source: str
    task: str
    options: tuple[str, ...]
    answer: int
    # log p(option | prompt), summed over the tokens of the option.
    log_probs: tuple[float, ...]

    @property
    def per_character(self) -> tuple[float, ...]:
        """Return the log-probabilities divided by the characters of the option, white space around it not counted."""
        return tuple(
            log_prob / max(1, len(text.strip())) for log_prob, text in zip(self.log_probs, self.options, strict=True)
        )

    def chosen(self, normalize: Normalize) -> int:
        """Return the index of the likeliest option; of equal ones the first."""
        values = self.log_probs if normalize == "sum" else self.per_character
        return max(range(len(values)), key=values.__getitem__)

    def is_correct(self, normalize: Normalize) -> bool:
        """Return whether the likeliest option is the right one."""
        return self.chosen(normalize) == self.answer


@dataclass(frozen=True)
class OptionScores:
    """The scored items; both ways to normalize can be read from them."""

    items: tuple[OptionItem, ...]
    # The way that counts.
    normalize: Normalize

    def accuracies(self, normalize: Normalize | None = None) -> Accuracies:
        """Return the accuracies under `normalize`, by default the way that counts."""
        way = normalize or self.normalize
        return Accuracies.of([item.is_correct(way) for item in self.items], [item.task for item in self.items])

    def records(self) -> list[dict[str, Any]]:
        """Return one record an item, to be written as JSON."""
        return [
            {
                "source": item.source,
                "task": item.task,
                "options": item.options,
                "log_probs": item.log_probs,
                "per_character": item.per_character,
                "answer": item.answer,
                "chosen": item.chosen(self.normalize),
                "correct": item.is_correct(self.normalize),
            }
            for item in self.items
        ]


def score_options(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    normalize: Normalize = "sum",
    progress: bool = False,
) -> OptionScores:
    """Score every option of every example by its log-likelihood after the prompt; the end token does not count.

    `batch_size` is the largest number of items in a forward pass.

    Raises:
        UserError: an example has no options, or `normalize` is unknown.
    """
    if normalize not in get_args(Normalize):
        hint = nearest(normalize, get_args(Normalize))
        raise UserError(f"normalize '{normalize}' is unknown; it is 'sum' or 'characters'.{hint}")
    answers = [_answer(example) for example in examples]
    prompts = prompt_ids(examples, tokenizer)
    options = iter(completion_ids([option for example in examples for option in example.choices], tokenizer))
    scored = [
        ScoredItem(prompt, [next(options) for _ in example.choices])
        for example, prompt in zip(examples, prompts, strict=True)
    ]
    log_probs = completion_log_probs(model, scored, batch_size=batch_size, progress=progress)
    items = tuple(
        OptionItem(example.source, example.task, example.choices, answer, values)
        for example, answer, values in zip(examples, answers, log_probs, strict=True)
    )
    return OptionScores(items, normalize)


def _answer(example: Example) -> int:
    if example.answer is None or len(example.choices) < 2:
        raise UserError(f"{example.source}: option scoring needs choices and an answer; score this set by generation")
    return example.answer
