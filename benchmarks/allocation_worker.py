"""A contestant of scoring as a process: `python -m benchmarks.allocation_worker {"work": NAME, "batches": K}`.

NAME is a proxy, which scores all sites from K batches, or "passes": the same batches forward and backward, the model
called as `transformers.Trainer` calls it. Both count how often tokens go forward through the last block, and back.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.training_worker import adapter_config, padded
from benchmarks.turns import Turns
from benchmarks.workload import BATCH, MODEL, THREADS, TrainingWork, batches, training_rows
from loraplex import start_allocation
from loraplex.allocation.contracts import Batch
from loraplex.allocation.proxies import Scoring, score
from loraplex.models.loading import load_model, load_tokenizer


class Passes:
    """Counts passes of more than a few tokens: what looks at the head is none."""

    def __init__(self, block: nn.Module) -> None:
        self.forward = self.backward = 0
        block.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        if hidden.shape[:-1].numel() > BATCH:
            self.forward += 1
            if hidden.requires_grad:
                hidden.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.backward += 1

    def take(self) -> dict[str, int]:
        """Return the counts since the last call."""
        counts = {"forward": self.forward, "backward": self.backward}
        self.forward = self.backward = 0
        return counts


def main(work: str, count: int) -> None:
    """Load, then take rounds until nobody wants more."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    turns = Turns()
    rows = training_rows(load_tokenizer(MODEL))
    model = load_model(MODEL, "bfloat16")
    turns.loaded()
    found = batches(rows, BATCH)
    data = [padded(found[index % len(found)]) for index in range(count)]
    tokens = int(sum(batch["attention_mask"].sum() for batch in data))
    allocation = {"name": "hetero", "batches": count}
    adapted = get_peft_model(model, adapter_config(TrainingWork("loraplex", allocation=allocation))).train()
    assert isinstance(adapted, PeftModel)
    once = _passes(adapted, data) if work == "passes" else _score(work, adapted, data)
    counted = Passes(model.base_model.layers[-1])

    def round_of_work(index: int) -> tuple[int, dict[str, Any]]:
        once()
        return tokens, counted.take()

    turns.serve(round_of_work, tidy=adapted.zero_grad)


def _passes(adapted: PeftModel, data: list[Batch]) -> Callable[[], None]:
    def once() -> None:
        for batch in data:
            items = (batch["labels"][:, 1:] != -100).sum()
            adapted(**batch, num_items_in_batch=items).loss.backward()

    return once


def _score(proxy: str, adapted: PeftModel, data: list[Batch]) -> Callable[[], None]:
    scene = start_allocation(adapted, data, total_steps=10_000).scene()
    how = Scoring(init="random" if proxy == "snip" else "own")

    def once() -> None:
        score(proxy, scene, how)

    return once


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    main(told["work"], told["batches"])
