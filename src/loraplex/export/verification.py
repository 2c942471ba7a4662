"""How far the reloaded result is from the adapter it was made of, on real text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from loraplex.data import Example
from loraplex.data.tokenization import prompt_ids, tokenize
from loraplex.errors import UserError
from loraplex.models.agreement import Agreement, model_logits

# Largest difference of a logit, as a share of the largest logit, by the type that is written: everything is computed in
# float32, so what remains is the rounding of the file.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-7, torch.bfloat16: 2**-4}

LONGEST = 128  # tokens of a row that are compared
MOST_ROWS = 64  # whose logits are held: 25 MB each for 50,000 words

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


def read_prompts(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example] | None = None) -> list[list[int]]:
    """Return the token ids to compare on: the built-in texts, or examples with their completions.

    Of more than `MOST_ROWS` examples so many are taken, at even distances.
    """
    if examples is None:
        rows = prompt_ids([Example(text, "") for text in PROMPTS], tokenizer)
    else:
        taken = min(len(examples), MOST_ROWS)
        some = [examples[i * len(examples) // taken] for i in range(taken)]
        rows = [row["input_ids"] for row in tokenize(some, tokenizer).rows]
    return [row[:LONGEST] for row in rows]


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
