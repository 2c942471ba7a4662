"""How far the reloaded result is from the adapter it was made of, on real text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from loraplex.data import Example
from loraplex.data.tokenization import prompt_ids, tokenize
from loraplex.errors import UserError

LONGEST = 128  # tokens of a row that are compared

PROMPTS = (
    "The capital of France is Paris. It lies on the river Seine, and about two million people live there.",
    "Question: If a train leaves at 9:40 and the journey takes 85 minutes, when does it arrive?\nAnswer: At 11:05.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Once upon a time an old fisherman found a letter in a bottle. He could not read it, so he asked his daughter.",
    "Water boils at 100 degrees Celsius at sea level, but at a lower temperature in the mountains, because",
    "Dear Ms. Miller,\n\nthank you for your order of 12 March. Unfortunately two of the three books are out of print.",
    "Is this review positive or negative? 'The plot is thin, yet the actors make every minute worth it.' It is",
    "Die Katze sitzt auf dem Dach und wartet, bis der Regen aufhört. Translated into English: The cat",
)


@dataclass(frozen=True)
class Agreement:
    """How two models compare at every position of the same rows."""

    reader: str
    """Who computed the second set of logits."""
    rows: int
    tokens: int
    largest_logit: float
    """Of the adapter as it was."""
    max_difference: float
    """Of any logit."""
    mean_difference: float
    kl: float
    """KL(adapter as it was ‖ reloaded) in nats per position."""
    same_top1: float
    """Share of positions at which both predict the same next token."""
    tolerance: float
    """Allowed `max_difference` as a share of `largest_logit`."""

    @property
    def passed(self) -> bool:
        """Whether the largest difference is allowed; NaN is not."""
        return self.max_difference <= self.tolerance * self.largest_logit

    def __str__(self) -> str:
        return (
            f"{self.reader}: logits (up to {self.largest_logit:.3g}) differ by {self.max_difference:.2g} at most and "
            f"{self.mean_difference:.2g} on average, KL {self.kl:.2g} nats, same top token at {self.same_top1:.2%} of "
            f"{self.tokens:,} positions"
        )


def read_prompts(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example] | None = None) -> list[list[int]]:
    """Return the token ids to compare on: the built-in texts, or the examples with their completions."""
    if examples is None:
        rows = prompt_ids([Example(text, "") for text in PROMPTS], tokenizer)
    else:
        rows = [row["input_ids"] for row in tokenize(examples, tokenizer).rows]
    return [row[:LONGEST] for row in rows]


@torch.inference_mode()
def model_logits(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the logits (tokens, vocabulary) of every row, in float32 on the CPU."""
    device = next(model.parameters()).device
    return [model(input_ids=torch.tensor([list(row)], device=device)).logits[0].float().cpu() for row in rows]


def pair_logits(
    base: nn.Module, pairs: Mapping[str, tuple[Tensor, Tensor]], rows: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Return the logits of `base` with y + (x Aᵀ) Bᵀ at every module that `pairs` names: A (r, in), B (out, r).

    For readers of files: nothing of the tuner takes part. The base model is left as it was.
    """
    handles = []
    try:
        for name, (a, b) in pairs.items():
            module = base.get_submodule(name)

            def add(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                return y + F.linear(F.linear(inputs[0], a.to(y)), b.to(y))

            handles.append(module.register_forward_hook(add))
        return model_logits(base, rows)
    finally:
        for handle in handles:
            handle.remove()


def compare(reader: str, before: Sequence[Tensor], after: Sequence[Tensor], tolerance: float) -> Agreement:
    """Return how the logits `after` of `reader` agree with those `before`; each is (tokens, vocabulary) per row."""
    tokens = sum(len(logits) for logits in before)
    differences = [(a - b).abs() for a, b in zip(before, after, strict=True)]
    kl = sum(_kl(a, b) for a, b in zip(before, after, strict=True))
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(before, after, strict=True))
    return Agreement(
        reader=reader,
        rows=len(before),
        tokens=tokens,
        largest_logit=max(float(logits.abs().max()) for logits in before),
        # of tensors, because max() of Python's would skip NaN
        max_difference=float(torch.stack([difference.max() for difference in differences]).max()),
        mean_difference=sum(float(d.double().mean()) * len(d) for d in differences) / tokens,
        kl=kl / tokens,
        same_top1=same / tokens,
        tolerance=tolerance,
    )


def _kl(before: Tensor, after: Tensor) -> float:
    """Return Σ over positions of KL(before ‖ after)."""
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return max(0.0, float(F.kl_div(q, p, reduction="sum", log_target=True)))


def check(agreements: Sequence[Agreement]) -> None:
    """Raise a UserError for the first comparison that failed."""
    for agreement in agreements:
        if not agreement.passed:
            allowed = agreement.tolerance * agreement.largest_logit
            raise UserError(
                f"the export does not compute what the adapter does, says {agreement.reader}: a logit differs by "
                f"{agreement.max_difference:.3g}, {allowed:.3g} is allowed (--tolerance {agreement.tolerance:.3g} of "
                "the largest logit); nothing was put in place"
            )
