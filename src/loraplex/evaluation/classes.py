"""How often a classification head is right: accuracy, and F1 = 2·TP / (2·TP + FP + FN) of a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm import tqdm
from transformers import DataCollatorWithPadding

from loraplex.data.examples import Example
from loraplex.data.text_classes import tokenize_texts
from loraplex.evaluation.batches import evaluating, length_batches
from loraplex.evaluation.results import Accuracies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Padded tokens of a forward pass.
MOST_TOKENS = 16384


@dataclass(frozen=True)
class ClassItem:
    """One item as it was classified."""

    source: str
    task: str
    answer: int
    log_probs: tuple[float, ...]
    """log p(class | text)."""

    @property
    def chosen(self) -> int:
        """The index of the likeliest class; of equal ones the first."""
        return max(range(len(self.log_probs)), key=self.log_probs.__getitem__)


@dataclass(frozen=True)
class ClassScores:
    """The classified items."""

    classes: tuple[str, ...]
    items: tuple[ClassItem, ...]

    def accuracies(self) -> Accuracies:
        """Return the accuracies."""
        return Accuracies.of([item.chosen == item.answer for item in self.items], [item.task for item in self.items])

    def f1(self) -> float:
        """Return F1, 0 where it is undefined: of two classes the second's, as usual for MRPC; of more their mean."""
        from sklearn.metrics import f1_score

        answers, chosen = [item.answer for item in self.items], [item.chosen for item in self.items]
        labels = [1] if len(self.classes) == 2 else list(range(len(self.classes)))
        return float(f1_score(answers, chosen, labels=labels, average="macro", zero_division=0.0))

    def records(self) -> list[dict[str, Any]]:
        """Return one record an item, to be written as JSON."""
        return [
            {
                "source": item.source,
                "task": item.task,
                "options": self.classes,
                "log_probs": item.log_probs,
                "answer": item.answer,
                "chosen": item.chosen,
                "correct": item.chosen == item.answer,
            }
            for item in self.items
        ]


def score_classes(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    classes: Sequence[str],
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> ClassScores:
    """Classify every example; texts are cut at the model's own limit, whatever they were cut to in training.

    `batch_size` is the largest number of items in a forward pass.

    Raises:
        UserError: when an example has other options than `classes`.
    """
    device = next(model.parameters()).device
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    padded = DataCollatorWithPadding(tokenizer)
    rows = tokenize_texts(examples, tokenizer, classes, limit).rows
    found: list[tuple[float, ...]] = [()] * len(rows)
    with evaluating(model), tqdm(total=len(rows), desc="classes", disable=not progress, leave=False) as bar:
        for batch in length_batches([len(row["input_ids"]) for row in rows], batch_size, MOST_TOKENS):
            inputs: Any = padded(
                [{key: value for key, value in rows[index].items() if key != "labels"} for index in batch]
            )
            log_probs = model(**inputs.to(device)).logits.float().log_softmax(-1)
            for index, values in zip(batch, log_probs.tolist(), strict=True):
                found[index] = tuple(values)
            bar.update(len(batch))
    items = (
        ClassItem(example.source, example.task, row["labels"], values)
        for example, row, values in zip(examples, rows, found, strict=True)
    )
    return ClassScores(tuple(classes), tuple(items))
