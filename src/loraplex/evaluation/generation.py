"""Answers that a model writes: generated in batches, then matched exactly or searched for a label."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from tqdm import tqdm

from loraplex.data.commonsense import LABELS
from loraplex.data.examples import Example
from loraplex.data.tokenization import completion_ids, prompt_ids, turn_end
from loraplex.errors import UserError, nearest
from loraplex.evaluation.batches import evaluating, length_batches
from loraplex.evaluation.results import Accuracies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Match = Literal["exact", "labels"]
# Tokens a generated answer may be longer than the longest right one: what is longer is wrong anyway.
_SPARE_TOKENS = 8


@dataclass(frozen=True)
class Decoding:
    """How an answer is searched for; nothing is ever sampled."""

    num_beams: int = 1
    # None: a little more than the longest right answer has.
    max_new_tokens: int | None = None


# What the published evaluation amounts to: it passes a temperature too, but without sampling that does nothing.
LLM_ADAPTERS = Decoding(num_beams=4, max_new_tokens=32)


@dataclass(frozen=True)
class GenerationItem:
    """One item as it was answered."""

    source: str
    task: str
    # What the model wrote.
    text: str
    # What was found in it; None where nothing could be.
    found: str | None
    expected: str

    @property
    def correct(self) -> bool:
        """Return whether what was found is what was expected, case and all."""
        return self.found == self.expected


@dataclass(frozen=True)
class GenerationScores:
    """The answered items."""

    items: tuple[GenerationItem, ...]
    match: Match

    def accuracies(self) -> Accuracies:
        """Return the accuracies; an answer in which nothing is found counts as wrong."""
        return Accuracies.of([item.correct for item in self.items], [item.task for item in self.items])

    @property
    def unparsable(self) -> float:
        """Return the share of answers in which nothing was found."""
        return sum(item.found is None for item in self.items) / len(self.items)

    def records(self) -> list[dict[str, Any]]:
        """Return one record an item, to be written as JSON."""
        return [{**asdict(item), "correct": item.correct} for item in self.items]


def score_generation(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    match: Match = "exact",
    decoding: Decoding | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> GenerationScores:
    """Let the model answer every prompt, and compare.

    `match="exact"` compares the whole answer, white space around it aside, and decodes greedily by default.
    `match="labels"` is the LLM-Adapters protocol: the first of the task's labels in the answer counts, and the default
    is `LLM_ADAPTERS`; its published runs answer one item at a time, and `batch_size` does not change the answers but
    for rounding.

    Raises:
        UserError: `match` is unknown, or a task has no labels to look for.
    """
    if match not in get_args(Match):
        hint = nearest(match, get_args(Match))
        raise UserError(f"match '{match}' is unknown; it is 'exact' or 'labels'.{hint}")
    find = _whole if match == "exact" else first_label
    expected = [find(example, example.completion) for example in examples]
    if decoding is None:
        decoding = LLM_ADAPTERS if match == "labels" else Decoding()
    texts = generate_texts(model, tokenizer, examples, decoding, batch_size=batch_size, progress=progress)
    items = []
    for example, right, text in zip(examples, expected, texts, strict=True):
        if right is None:
            raise UserError(f"{example.source}: nothing to look for in the right answer {example.completion!r}")
        items.append(GenerationItem(example.source, example.task, text, find(example, text), right))
    return GenerationScores(tuple(items), match)


def generate_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    decoding: Decoding,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> list[str]:
    """Return what the model writes after each prompt, up to its end token or the length limit."""
    prompts = prompt_ids(examples, tokenizer)
    longest = decoding.max_new_tokens
    if longest is None:
        right = completion_ids([example.completion for example in examples], tokenizer)
        longest = max(map(len, right)) + _SPARE_TOKENS
    has_chat = any(not isinstance(example.prompt, str) for example in examples)
    config = _generation_config(model, tokenizer, decoding.num_beams, longest, has_chat)
    device = next(model.parameters()).device
    texts = [""] * len(examples)
    generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]
    with evaluating(model), tqdm(total=len(examples), desc="answers", disable=not progress, leave=False) as bar:
        for batch in length_batches([len(prompt) for prompt in prompts], batch_size):
            ids, mask = left_padded([prompts[index] for index in batch])
            made = generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
            decoded = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(batch, decoded, strict=True):
                texts[index] = text
            bar.update(len(batch))
    return texts


def left_padded(prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask, both (rows, longest), padded on the left.

    The mask is made from the lengths: the padding token of many tokenizers is also their end token, and a prompt may
    hold that.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def first_label(example: Example, text: str) -> str | None:
    """Return the first label of the example's task in `text`, as the published protocol looks for it, or None.

    Raises:
        UserError: the task is none of the eight.
    """
    if example.task not in LABELS:
        known = nearest(example.task, LABELS) or f" The tasks are {', '.join(LABELS)}."
        raise UserError(f"{example.source}: the label protocol does not know task '{example.task}'.{known}")
    # A model that goes on to make up another instruction has answered before that.
    answer = text.partition("### Response:")[0]
    found = re.search("|".join(LABELS[example.task]), answer)
    return found and found.group()


def _whole(example: Example, text: str) -> str | None:
    return text.strip() or None


def _generation_config(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, num_beams: int, longest: int, has_chat: bool
) -> Any:
    """Return plain greedy or beam search; whatever the model's own defaults would add is switched off."""
    from transformers import GenerationConfig

    stops = {tokenizer.eos_token_id}
    own = model.generation_config.eos_token_id  # type: ignore[union-attr]
    stops.update(own if isinstance(own, list) else [own])
    if has_chat and len(end := turn_end(tokenizer)) == 1:
        stops.update(end)
    return GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=longest,
        eos_token_id=sorted(stop for stop in stops if stop is not None),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        length_penalty=1.0,
        early_stopping=False,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
    )
