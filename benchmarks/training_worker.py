"""A training contestant as a process: `python -m benchmarks.training_worker WORK`, WORK being a `TrainingWork` in JSON.

Whole steps run under TRL's SFTTrainer as it is installed, with these settings; the model's weights are bf16 and the
adapters fp32 in all of them:

padded: no checkpointing, no autocast, padded batches, as most scripts have it (loraplex runs with exactly this).
best: the same and `padding_free=True`, TRL's fastest on a CPU.
shipped: SFTConfig's own defaults, which are checkpointing and autocast.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from benchmarks.limit import limit_step
from benchmarks.turns import Finished, Turns
from benchmarks.workload import (
    ALPHA,
    LEARNING_RATE,
    MAX_TOKENS,
    MODEL,
    THREADS,
    TrainingWork,
    batch_size,
    batches,
    training_rows,
)
from loraplex.data.tokenization import TokenRow
from loraplex.models.loading import load_model, load_tokenizer

_MORE_STEPS_THAN_ROUNDS = 10_000


def main(work: TrainingWork) -> None:
    """Load, then take rounds until nobody wants more."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    turns = Turns()
    tokenizer = load_tokenizer(MODEL)
    rows = training_rows(tokenizer, work.length)
    model = load_model(MODEL, "bfloat16")
    turns.loaded()
    if work.library == "limit":
        _serve_limit(turns, model, batches(rows, batch_size(work)))
    elif work.setting == "bare":
        _serve_bare(turns, model, work, batches(rows, batch_size(work)))
    else:
        _serve_trainer(turns, model, tokenizer, work, rows)


def adapter_config(work: TrainingWork) -> PeftConfig:
    """Return the configuration of the contestant's adapter."""
    if work.library == "loraplex":
        from loraplex import AdapterConfig

        return AdapterConfig(
            adapter=work.adapter,
            allocation=work.allocation,
            r=work.rank,
            lora_alpha=ALPHA,
            target_modules=list(work.kinds),
            task_type="CAUSAL_LM",
            **({"objective": work.objective} if work.objective else {}),
        )
    return LoraConfig(
        r=work.rank,
        lora_alpha=ALPHA,
        target_modules=list(work.kinds),
        task_type="CAUSAL_LM",
        use_dora=work.adapter == "dora",
    )


def _serve_limit(turns: Turns, model: PreTrainedModel, data: list[list[TokenRow]]) -> None:
    step = limit_step(model)
    turns.serve(lambda index: (_tokens(batch := data[index % len(data)]), {"loss": step(batch)}))


def _serve_bare(turns: Turns, model: PreTrainedModel, work: TrainingWork, data: list[list[TokenRow]]) -> None:
    """Forward and backward, the model called as SFTTrainer calls it, on padded batches."""
    from peft import get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    adapted = get_peft_model(model, adapter_config(work)).train()
    _check_dtypes(adapted)
    inputs = [padded(batch) for batch in data]

    def step(index: int) -> tuple[int, dict[str, Any]]:
        output = adapted(**inputs[index % len(inputs)], use_cache=False, fused_lm_head=True)
        loss = -output.log_probs.sum() / output.label_mask.sum()
        loss.backward()
        return _tokens(data[index % len(data)]), {"loss": float(loss.detach())}

    turns.serve(step, tidy=adapted.zero_grad)


def padded(batch: list[TokenRow]) -> dict[str, torch.Tensor]:
    """Return a batch as a collator makes it, its labels on the completions."""
    rows = [torch.tensor(row["input_ids"]) for row in batch]
    learnt = [torch.tensor(row["completion_mask"]).bool() for row in batch]
    labels = [ids.masked_fill(~mask, -100) for ids, mask in zip(rows, learnt, strict=True)]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True),
        "attention_mask": pad([torch.ones_like(ids) for ids in rows], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def _serve_trainer(
    turns: Turns,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    work: TrainingWork,
    rows: list[TokenRow],
) -> None:
    """Optimizer steps under an unmodified SFTTrainer; a callback makes each of them wait for its turn."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=batch_size(work),
            max_steps=_MORE_STEPS_THAN_ROUNDS,
            completion_only_loss=True,
            learning_rate=LEARNING_RATE,
            train_sampling_strategy="sequential",
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
            **_setting(work),
        )
        trainer = SFTTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_list([dict(row) for row in rows]),
            processing_class=tokenizer,
            peft_config=adapter_config(work),
            callbacks=[Pacing(turns, [_tokens(batch) for batch in batches(rows, batch_size(work))])],
        )
        assert isinstance(trainer.train_dataset, Dataset)
        assert trainer.model is not None
        if list(trainer.train_dataset["input_ids"]) != [row["input_ids"] for row in rows]:
            raise SystemExit("SFTTrainer changed the rows: the contestants would not do the same work")
        _check_dtypes(trainer.model)
        try:
            trainer.train()
        except Finished:
            return


def _setting(work: TrainingWork) -> dict[str, Any]:
    longest = max(MAX_TOKENS, work.length or 0)
    plain = {"gradient_checkpointing": False, "bf16": False}
    settings: dict[str, dict[str, Any]] = {
        "padded": {**plain, "max_length": longest},
        "best": {**plain, "max_length": None, "padding_free": True},
        "shipped": {},
    }
    return settings[work.setting]


class Pacing(TrainerCallback):
    """Holds every step until its turn comes, and times it."""

    def __init__(self, turns: Turns, tokens: list[int]) -> None:
        self.turns = turns
        self.tokens = tokens
        self.seconds = self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait; the batch has been collated by now."""
        self.turns.wait()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the watch: gradients are clipped, the optimizer and the schedule have made their step."""
        self.seconds = time.perf_counter() - self.start

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Report the step together with its loss."""
        if logs and "loss" in logs:
            tokens = self.tokens[(state.global_step - 1) % len(self.tokens)]
            self.turns.report(self.seconds, tokens, loss=float(logs["loss"]))


def _tokens(batch: list[TokenRow]) -> int:
    return sum(len(row["input_ids"]) for row in batch)


def _check_dtypes(model: torch.nn.Module) -> None:
    """Make sure that every contestant trains float32 adapters on bfloat16 weights."""
    found = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    if found != {(True, torch.float32), (False, torch.bfloat16)}:
        raise SystemExit(f"expected float32 adapters on bfloat16 weights, found {found}")


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    main(TrainingWork(**{**told, "kinds": tuple(told["kinds"])}))
