"""Training steps: loraplex against the limit and against PEFT under TRL in three settings."""

from __future__ import annotations

from dataclasses import asdict

from benchmarks import results
from benchmarks.ratios import Comparison
from benchmarks.results import Plan
from benchmarks.rounds import alternate
from benchmarks.workload import ALPHA, BATCH, KINDS, LEARNING_RATE, MLP, TRAINING_FILE, TrainingWork

_OURS_LORA = TrainingWork("loraplex", "lora")

CONTESTANTS: dict[str, dict[str, TrainingWork]] = {
    "lora": {
        "ours": _OURS_LORA,
        "peft-best": TrainingWork("peft", "lora", "best"),
        "peft-padded": TrainingWork("peft", "lora", "padded"),
        "peft-shipped": TrainingWork("peft", "lora", "shipped"),
        "limit": TrainingWork("limit"),
        "ours-bare": TrainingWork("loraplex", "lora", "bare"),
    },
    "dora": {
        "ours": TrainingWork("loraplex", "dora"),
        "peft-best": TrainingWork("peft", "dora", "best"),
        "peft-padded": TrainingWork("peft", "dora", "padded"),
        "peft-shipped": TrainingWork("peft", "dora", "shipped"),
        "ours-lora": _OURS_LORA,
        "limit": TrainingWork("limit"),
        "ours-bare": TrainingWork("loraplex", "dora", "bare"),
    },
    "pair": {"ours": TrainingWork("loraplex", "dora"), "ours-lora": _OURS_LORA},
    "compact": {
        **{name: TrainingWork("loraplex", name) for name in ("prolora", "tied-tl5", "tied-tl6", "lora-xs")},
        "pissa": TrainingWork("loraplex", {"name": "lora", "init": "pissa"}),
        "ours-lora": _OURS_LORA,
    },
    "hydra": {
        "ours": TrainingWork("loraplex", "hydra"),
        "ours-lora": _OURS_LORA,
        "ours-mlp": TrainingWork("loraplex", "hydra", kinds=MLP),
        "ours-lora-mlp": TrainingWork("loraplex", "lora", kinds=MLP),
    },
    "echo": {
        "echo-never": TrainingWork("loraplex", objective={"name": "echo", "probability": 0.0}),
        "echo-always": TrainingWork("loraplex", objective={"name": "echo", "probability": 1.0}),
        "echo-full": TrainingWork("loraplex", objective={"name": "echo", "probability": 1.0, "second_pass": "full"}),
        "ours-lora": _OURS_LORA,
    },
}
"""By adapter; beside our LoRA of the same rank DoRA (in more rounds), the compact adapters, Hydra's four heads, and
LoRA under the objective echo. That one's second pass is drawn with probability p, and the expected time is linear in p:
what holds at p = 0 and at p = 1 holds for all.

`bare` is forward and backward without a trainer, `mlp` has the sites of the HydraLoRA paper only."""

COMPARISONS: dict[str, tuple[Comparison, ...]] = {
    "lora": (
        Comparison("ours-bare", "limit", goal=0.92),
        Comparison("ours", "limit", goal=0.90),
        Comparison("ours", "peft-best", goal=1.9),
        Comparison("ours", "peft-padded", goal=4.0),
        Comparison("ours", "peft-shipped"),
        Comparison("ours", "peft-best", "memory", goal=0.8),
        Comparison("ours", "peft-padded", "memory", goal=0.6),
        Comparison("ours", "peft-shipped", "memory"),
    ),
    "dora": (
        Comparison("ours", "ours-lora", "time", goal=1.08),
        Comparison("ours-bare", "limit"),
        Comparison("ours", "limit"),
        Comparison("ours", "peft-best", goal=2.5),
        Comparison("ours", "peft-padded"),
        Comparison("ours", "peft-shipped"),
        Comparison("ours", "peft-best", "memory", goal=0.8),
        Comparison("ours", "peft-padded", "memory", goal=0.6),
        Comparison("ours", "peft-shipped", "memory"),
    ),
    "pair": (Comparison("ours", "ours-lora", "time", goal=1.08), Comparison("ours", "ours-lora", "memory")),
    "compact": tuple(
        Comparison(name, "ours-lora", "time", goal=1.15)
        for name in ("prolora", "tied-tl5", "tied-tl6", "lora-xs", "pissa")
    ),
    "hydra": (
        Comparison("ours", "ours-lora", "time", goal=1.10),
        Comparison("ours-mlp", "ours-lora-mlp", "time", goal=1.10),
        Comparison("ours", "ours-lora", "memory"),
        Comparison("ours-mlp", "ours-lora-mlp", "memory"),
    ),
    "echo": (
        Comparison("echo-never", "ours-lora", "time", goal=1.05),
        Comparison("echo-always", "ours-lora", "time", goal=2 * 1.05),
        Comparison("echo-full", "ours-lora", "time", goal=2 * 1.05),
        Comparison("echo-never", "ours-lora", "memory"),
        Comparison("echo-always", "ours-lora", "memory", goal=1.25),
        Comparison("echo-full", "ours-lora", "memory"),
    ),
}


def run(adapter: str, plan: Plan) -> None:
    """Measure one adapter, print the tables and write `training-ADAPTER.json`.

    Raises:
        UserError: the benchmark sets are not on this machine.
    """
    from loraplex.data.sources import benchmark_path

    benchmark_path(TRAINING_FILE)
    beginning = results.header(f"training-{adapter}", plan)
    records = alternate(
        "benchmarks.training_worker",
        {name: asdict(work) for name, work in CONTESTANTS[adapter].items()},
        rounds=plan.rounds,
        warm_up=plan.warm_up,
        title=f"training {adapter}",
    )
    beginning["settings"] = {"batch": BATCH, "rank": _OURS_LORA.rank, "alpha": ALPHA, "kinds": KINDS} | {
        "learning_rate": LEARNING_RATE,
        "weights": "bfloat16",
        "adapters": "float32",
    }
    result = results.contest(beginning, records, COMPARISONS[adapter], unit="real tokens")
    results.show(result)
    results.write(result, plan)
