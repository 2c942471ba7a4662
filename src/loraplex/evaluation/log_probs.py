"""The log-probabilities of completions given their prompts: log p(c | x) = Σ_t log p(c_t | x, c_<t).

An item is a prompt and, one after the other, all its completions. A mask lets a completion see the prompt and itself,
and its positions continue those of the prompt: the prompt is computed once for all of them, and the result is that of
separate rows. The items of a batch lie end to end in one row, without padding, each attending within itself alone.
A model that does not take its attention so gets a row for every completion, padded on the right, which any model takes.
Only the columns that foretell a token of a completion go through the output layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from loraplex.compat.transformers import attention_of
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
    with (
        evaluating(model),
        _attending_by_sequence(model) if share else nullcontext(),
        tqdm(total=len(rows), desc="options", disable=not progress, leave=False) as bar,
    ):
        for batch in length_batches([len(row) for row in rows], width, MOST_TOKENS):
            layout = _lay_out([rows[index] for index in batch], packed=share)
            for index, values in zip(batch, _score(model, layout), strict=True):
                found[index] = values
            bar.update(len(batch))
    flat = iter(value for values in found for value in values)
    return [tuple(next(flat) for _ in item.completions) for item in items]


@dataclass(frozen=True)
class _Layout:
    """The tensors of a batch, and for every completion token where its logits are."""

    inputs: dict[str, Any]
    """Arguments of the model."""
    columns: Tensor
    """(steps,) columns whose logits are wanted, the same ones in every row."""
    places: tuple[Tensor, Tensor]
    """(completion tokens,) each: row, and index into `columns`, of what foretells a token."""
    targets: Tensor
    """(completion tokens,)"""
    owners: Tensor
    """(completion tokens,) number of the completion within the batch."""
    completions: list[int]
    """Number of completions of every item."""


def _score(model: nn.Module, layout: _Layout) -> list[list[float]]:
    """Run one batch and return the log-probability of every completion of every item."""
    logits = _forward(model, layout)
    device = logits.device
    totals = torch.zeros(sum(layout.completions), dtype=torch.promote_types(logits.dtype, torch.float32))
    steps = (*layout.places, layout.targets, layout.owners)
    for rows, columns, targets, owners in zip(*(step.split(MOST_LOGITS) for step in steps), strict=True):
        wanted = logits[rows.to(device), columns.to(device)].to(totals.dtype)
        picked = wanted.gather(1, targets.to(device)[:, None])[:, 0] - wanted.logsumexp(dim=1)
        totals.index_add_(0, owners, picked.cpu())
    values = iter(totals.tolist())
    return [[next(values) for _ in range(count)] for count in layout.completions]


def _lay_out(batch: Sequence[ScoredItem], packed: bool) -> _Layout:
    """Return the batch as one row without padding, each prompt once, or as a row for every completion."""
    lengths = [len(item) for item in batch]
    ids = torch.zeros(len(batch), max(lengths), dtype=torch.long)
    positions, segments = torch.zeros_like(ids), torch.full_like(ids, -1)
    steps: list[tuple[int, int, int, int]] = []
    owner = 0
    for index, item in enumerate(batch):
        border = start = len(item.prompt)
        parts = [item.prompt, *item.completions]
        ids[index, : lengths[index]] = torch.tensor([token for part in parts for token in part])
        positions[index, :border], segments[index, :border] = torch.arange(border), 0
        for segment, completion in enumerate(item.completions, start=1):
            end = start + len(completion)
            positions[index, start:end] = torch.arange(border, border + len(completion))
            segments[index, start:end] = segment
            # The first token is foretold by the prompt's last, the others by the one before them.
            before = [border - 1, *range(start, end - 1)]
            steps += [(index, column, target, owner) for column, target in zip(before, completion, strict=False)]
            start, owner = end, owner + 1
    rows, columns, targets, owners = torch.tensor(steps, dtype=torch.long).reshape(-1, 4).T
    real = segments >= 0
    inputs: dict[str, Any]
    if packed:
        borders = nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        rows, columns = torch.zeros_like(rows), borders[rows] + columns
        masks = [_tree_mask(row[:length]) for row, length in zip(segments, lengths, strict=True)]
        inputs = {"input_ids": ids[real][None], "position_ids": positions[real][None], "sequence_masks": masks}
        inputs |= {"cu_seq_lens_q": borders.int(), "cu_seq_lens_k": borders.int()}
        inputs |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    else:
        inputs = {"input_ids": ids, "attention_mask": real.long()}
    wanted, places = columns.unique(return_inverse=True)
    counts = [len(item.completions) for item in batch]
    return _Layout(inputs, wanted, (rows, places), targets, owners, counts)


def _tree_mask(segments: Tensor) -> Tensor:
    """Return which columns each column of an item attends to, (columns, columns): those before it in its own branch."""
    query, key = segments[:, None], segments[None, :]
    return ((key == query) | (key == 0)).tril()


def _forward(model: nn.Module, layout: _Layout) -> Tensor:
    """Return the logits of the wanted columns, (rows, wanted, vocabulary)."""
    device = next(model.parameters()).device
    inputs = {name: _to(value, device) for name, value in layout.inputs.items()}
    columns = layout.columns.to(device)
    if "logits_to_keep" in inspect.signature(_base(model).forward).parameters:
        logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=columns).logits
        return logits
    return model(**inputs, use_cache=False).logits[:, columns]  # type: ignore[no-any-return]


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [tensor.to(device) for tensor in value]
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def _attending_by_sequence(model: nn.Module) -> Iterator[None]:
    """Let the model attend within packed sequences inside the block, and as before after it."""
    base = _base(model)
    before = attention_of(base.config)
    base.set_attn_implementation(PACKED_ATTENTION)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def _shares_prompts(model: nn.Module) -> bool:
    """Whether this model, as it is configured, attends exactly as a mask with four dimensions tells it to."""
    config: Any = _base(model).config
    is_windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    peft_config = getattr(model, "active_peft_config", None)
    return (
        config.model_type in SHARES_PROMPTS
        and attention_of(config) in ("sdpa", PACKED_ATTENTION)
        and not is_windowed
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and not getattr(peft_config, "is_prompt_learning", False)
    )


def _base(model: nn.Module) -> Any:
    """Return the transformers model inside a PEFT model, or `model` itself."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model
