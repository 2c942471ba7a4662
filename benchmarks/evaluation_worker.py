"""An evaluation contestant as a process: `python -m benchmarks.evaluation_worker WORK`, see `EvaluationWork`.

Both libraries get the same prompts and options as text and return log-likelihoods; tokenization is timed with them,
reading files, building tasks and averaging are not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.evaluation import EvaluationWork, items
from benchmarks.turns import Turns
from benchmarks.workload import MODEL, THREADS
from loraplex.data.examples import Example

Scorer = Callable[[list[Example]], list[int]]
"""Returns the index of the likeliest option of every item."""


def main(work: EvaluationWork) -> None:
    """Load, then score one slice of the items every round."""
    torch.set_num_threads(THREADS)
    turns = Turns()
    examples = items()[: work.items]
    slices = [examples[start : start + work.items_a_round] for start in range(0, work.items, work.items_a_round)]
    score = _ours(work) if work.library == "loraplex" else _harness(work)
    turns.loaded()

    def one_round(index: int) -> tuple[int, dict[str, Any]]:
        part = slices[index % len(slices)]
        return len(part), {"slice": index % len(slices), "chosen": score(part)}

    turns.serve(one_round)


def _ours(work: EvaluationWork) -> Scorer:
    from loraplex.evaluation.options import score_options
    from loraplex.models.loading import load_model, load_tokenizer

    model, tokenizer = load_model(MODEL, work.dtype), load_tokenizer(MODEL)
    assert work.batch_size is None

    def score(examples: list[Example]) -> list[int]:
        return [item.chosen("sum") for item in score_options(model, tokenizer, examples).items]

    return score


def _harness(work: EvaluationWork) -> Scorer:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from loraplex.models.loading import resolve_model

    assert work.batch_size is not None
    model = HFLM(pretrained=resolve_model(MODEL), device="cpu", dtype=work.dtype, batch_size=work.batch_size)

    def score(examples: list[Example]) -> list[int]:
        requests = [
            Instance("loglikelihood", {}, (example.prompt, choice), index)
            for example in examples
            for index, choice in enumerate(example.choices)
        ]
        answers = iter(model.loglikelihood(requests, disable_tqdm=True))
        found = []
        for example in examples:
            values = [next(answers)[0] for _ in example.choices]
            found.append(values.index(max(values)))
        return found

    return score


if __name__ == "__main__":
    main(EvaluationWork(**json.loads(sys.argv[1])))
