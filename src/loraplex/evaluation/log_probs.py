"""The log-probabilities of completions given their prompts: log p(c | x) = Σ_t log p(c_t | x, c_<t).

A row holds a prompt and, one after the other, all its completions. The attention mask lets a completion see the prompt
and itself, and its positions continue those of the prompt: the prompt is computed once for all of them, and the result
is that of separate rows. Its prompts are padded on the left, so that all completions of a batch begin in one column.
A model that does not take such a mask gets a row for every completion, padded on the right, which any model takes.
Only the columns from the last of a prompt on go through the output layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from loraplex.evaluation.batches import evaluating, length_batches
from loraplex.kernels.packed_attention import PACKED_ATTENTION

# Model types whose attention was seen to take a mask of its own making (tests/evaluation/test_log_probs.py runs each);
# the others get one completion a row.
SHARES_PROMPTS = frozenset(
    {"gemma", "gpt2", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
)
# Padded tokens in a batch, and logits of the full vocabulary in fp32 at a time: both bound memory.
MOST_TOKENS = 4096
MOST_LOGITS = 512


@dataclass(frozen=True)
class ScoredItem:
    """The token ids of a prompt, which is not empty, and of the completions to score after it."""

    prompt: list[int]
    completions: list[list[int]]

    def __len__(self) -> int:
        """Return the length of the row: the prompt and all completions."""
        return len(self.prompt) + sum(map(len, self.completions))


def completion_log_probs(
    model: nn.Module, items: Sequence[ScoredItem], *, batch_size: int = 16, progress: bool = False
) -> list[tuple[float, ...]]:
    """Return log p(completion | prompt) of every completion of every item, summed over its tokens in fp32 or better.

    An empty completion has log-probability 0. `batch_size` is the largest number of items in a forward pass.
    """
    share = _shares_prompts(model)
    rows = list(items) if share else [ScoredItem(i.prompt, [c]) for i in items for c in i.completions]
    width = batch_size if share else batch_size * max((len(item.completions) for item in items), default=1)
    found: list[list[float]] = [[] for _ in rows]
    with evaluating(model), tqdm(total=len(rows), desc="options", disable=not progress, leave=False) as bar:
        for batch in length_batches([len(row) for row in rows], width, MOST_TOKENS):
            for index, values in zip(batch, _score(model, [rows[index] for index in batch], share), strict=True):
                found[index] = values
            bar.update(len(batch))
    flat = iter(value for values in found for value in values)
    return [tuple(next(flat) for _ in item.completions) for item in items]


def _score(model: nn.Module, batch: Sequence[ScoredItem], share: bool) -> list[list[float]]:
    """Run one batch and return the log-probability of every completion of every row."""
    layout = _Layout(batch, align=share)
    logits = _forward(model, layout, share)
    totals = torch.zeros(
        sum(len(row.completions) for row in batch), dtype=torch.promote_types(logits.dtype, torch.float32)
    )
    steps = (layout.rows, layout.columns, layout.targets, layout.owners)
    for rows, columns, targets, owners in zip(*(step.split(MOST_LOGITS) for step in steps), strict=True):
        wanted = logits[rows.to(logits.device), columns.to(logits.device)].to(totals.dtype)
        picked = wanted.gather(1, targets.to(logits.device)[:, None])[:, 0] - wanted.logsumexp(dim=1)
        totals.index_add_(0, owners, picked.cpu())
    values = iter(totals.tolist())
    return [[next(values) for _ in row.completions] for row in batch]


class _Layout:
    """The tensors of a batch, and for every completion token where its logits are.

    ids, positions, segments: (rows, columns); a segment is −1 for padding, 0 for the prompt, 1, 2, ... for completions.
    rows, columns, targets, owners: (completion tokens,); `columns` count from column `first`, the earliest that
    foretells a token of a completion.
    """

    def __init__(self, batch: Sequence[ScoredItem], align: bool) -> None:
        longest = max(len(row.prompt) for row in batch)
        # Where the completions of a row begin.
        borders = [longest if align else len(row.prompt) for row in batch]
        width = max(border + len(row) - len(row.prompt) for border, row in zip(borders, batch, strict=True))
        self.first = min(borders) - 1
        self.ids = torch.zeros(len(batch), width, dtype=torch.long)
        self.positions = torch.zeros_like(self.ids)
        self.segments = torch.full_like(self.ids, -1)
        steps: list[tuple[int, int, int, int]] = []
        owner = 0
        for index, (border, row) in enumerate(zip(borders, batch, strict=True)):
            length = len(row.prompt)
            self._place(index, border - length, row.prompt, position=0, segment=0)
            start = border
            for segment, completion in enumerate(row.completions, start=1):
                self._place(index, start, completion, position=length, segment=segment)
                for offset, target in enumerate(completion):
                    # The first token is foretold by the prompt's last, the others by the one before them.
                    column = (border if offset == 0 else start + offset) - 1
                    steps.append((index, column - self.first, target, owner))
                start += len(completion)
                owner += 1
        self.rows, self.columns, self.targets, self.owners = torch.tensor(steps, dtype=torch.long).reshape(-1, 4).T

    def _place(self, index: int, start: int, ids: list[int], position: int, segment: int) -> None:
        columns = slice(start, start + len(ids))
        self.ids[index, columns] = torch.tensor(ids, dtype=torch.long)
        self.positions[index, columns] = torch.arange(position, position + len(ids))
        self.segments[index, columns] = segment


def _tree_mask(segments: Tensor) -> Tensor:
    """Return which columns each column attends to, (rows, 1, columns, columns): those before it in its own branch."""
    width = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    same_branch = (key == query) | (key == 0)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    # Padding attends to itself, because a row of the softmax with nothing in it is not a number.
    return ((key >= 0) & same_branch & causal | torch.eye(width, dtype=torch.bool))[:, None]


def _forward(model: nn.Module, layout: _Layout, share: bool) -> Tensor:
    """Return the logits from column `layout.first` on, (rows, columns − first, vocabulary)."""
    device = next(model.parameters()).device
    keep = layout.ids.shape[1] - layout.first
    mask = _tree_mask(layout.segments) if share else (layout.segments >= 0).long()
    extra: dict[str, Any] = {"position_ids": layout.positions.to(device)} if share else {}
    if "logits_to_keep" in inspect.signature(_base(model).forward).parameters:
        extra["logits_to_keep"] = keep
    logits: Tensor = model(
        input_ids=layout.ids.to(device), attention_mask=mask.to(device), use_cache=False, **extra
    ).logits
    return logits[:, -keep:]


def _shares_prompts(model: nn.Module) -> bool:
    """Whether this model, as it is configured, attends exactly as a mask with four dimensions tells it to."""
    config: Any = _base(model).config
    is_windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    peft_config = getattr(model, "active_peft_config", None)
    return (
        config.model_type in SHARES_PROMPTS
        and config._attn_implementation in ("sdpa", PACKED_ATTENTION)
        and not is_windowed
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and not getattr(peft_config, "is_prompt_learning", False)
    )


def _base(model: nn.Module) -> Any:
    """Return the transformers model inside a PEFT model, or `model` itself."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model
