"""What an allocation costs: scoring, in passes of training, and the steps between two revisions.

Scoring: K batches through a proxy against the same K batches forward and backward as a training step takes them, in
turns, each in a process of its own; the passes that the proxy really makes are counted besides.
Steps: whole steps under an unmodified SFTTrainer, with and without an allocation on the same rank. A revision falls
before the first step; none falls into the rounds.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from benchmarks import results
from benchmarks.ratios import Comparison
from benchmarks.results import Plan
from benchmarks.rounds import alternate
from benchmarks.workload import ALPHA, BATCH, KINDS, LEARNING_RATE, TRAINING_FILE, TrainingWork

BATCHES = 8
"""K."""
PROXIES = ("grad_norm", "snip", "fisher")
"""Those of one gradient. Fisher's looks at the outputs of every row, so its batches keep their padding."""
_STEP_LIMIT = 1.03

_OURS = TrainingWork("loraplex")
_ROUNDS = 8
"""Of ALoRA, which builds room for a rank in each."""
STEPS: dict[str, TrainingWork] = {
    "ours-lora": _OURS,
    "hetero-all": replace(_OURS, allocation={"name": "hetero", "proxy": "constant", "share": 1.0, "batches": 1}),
    "hetero-quarter": replace(_OURS, allocation={"name": "hetero", "share": 0.25, "batches": 1}),
    "hetero-proportional": replace(
        _OURS,
        allocation={"name": "hetero", "share": 0.25, "batches": 1, "ranks": "proportional", "unit": "parameters"},
    ),
    "alora": replace(_OURS, allocation={"name": "alora", "warmup_epochs": 9000, "in_steps": True, "rounds": _ROUNDS}),
    "ours-lora-room": replace(_OURS, rank=_OURS.rank + _ROUNDS),
}
"""`hetero-all` keeps every site: what an allocation costs by itself. `hetero-quarter` has bypassed sites, of
`hetero-proportional` some ranks of a site are closed, and `alora` has closed room for a new rank in
each of its rounds. `ours-lora-room` has as many ranks as `alora` and no allocation: what the room costs by itself."""


def run(part: str, plan: Plan) -> None:
    """Measure one part, print the tables and write `allocation-PART.json`.

    Raises:
        UserError: the benchmark sets are not on this machine.
    """
    from loraplex.data.sources import benchmark_path

    benchmark_path(TRAINING_FILE)
    _PARTS[part](plan)


def _scoring(plan: Plan) -> None:
    beginning = results.header("allocation-scoring", plan)
    proxies, count = (PROXIES[:1], 2) if plan.quick else (PROXIES, BATCHES)
    records = alternate(
        "benchmarks.allocation_worker",
        {name: {"work": name, "batches": count} for name in (*proxies, "passes")},
        rounds=plan.rounds,
        warm_up=plan.warm_up,
        title="scoring",
    )
    beginning["settings"] = {"batches": count, "batch": BATCH, "rank": _OURS.rank, "alpha": ALPHA, "kinds": KINDS}
    comparisons = [
        # K + 1 passes over K
        Comparison(name, "passes", "time", goal=None if name == "fisher" else (count + 1) / count)
        for name in proxies
    ]
    result = results.contest(beginning, records, comparisons, unit="real tokens")
    result["passes"] = {name: record.extra[-1] for name, record in records.items()}
    results.show(result)
    results.write(result, plan)


def _steps(plan: Plan) -> None:
    beginning = results.header("allocation-steps", plan)
    names = ("ours-lora", "hetero-proportional") if plan.quick else tuple(STEPS)
    records = alternate(
        "benchmarks.training_worker",
        {name: asdict(STEPS[name]) for name in names},
        rounds=plan.rounds,
        warm_up=plan.warm_up,
        title="steps between revisions",
    )
    beginning["settings"] = {"batch": BATCH, "rank": _OURS.rank, "alpha": ALPHA, "kinds": KINDS} | {
        "learning_rate": LEARNING_RATE,
        "allocations": {name: work.allocation for name, work in STEPS.items()},
    }
    allocated = [name for name, work in STEPS.items() if work.allocation != _OURS.allocation]
    comparisons = [Comparison(name, "ours-lora", "time", goal=_STEP_LIMIT) for name in allocated]
    comparisons += [
        Comparison("ours-lora-room", "ours-lora", "time"),
        Comparison("alora", "ours-lora-room", "time"),
    ]
    result = results.contest(beginning, records, comparisons, unit="real tokens")
    results.show(result)
    results.write(result, plan)


_PARTS = {"scoring": _scoring, "steps": _steps}
