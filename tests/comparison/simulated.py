"""A made-up comparison with everything that a real one can have: failures, uneven ranks, several tasks, trials."""

import math
import random
from dataclasses import dataclass, replace

from loraplex.comparison.results import Arm, Comparison, Item, Run, Trial

TASKS = {"arc-easy": 200, "sst-2": 180, "word reversal": 120}
SEEDS = [0, 1, 2]
BUDGET = 4_884_480
STEPS = 400
LAYERS = 30
KINDS = {
    "self_attn.q_proj": 16,
    "self_attn.k_proj": 4,
    "self_attn.v_proj": 10,
    "self_attn.o_proj": 16,
    "mlp.gate_proj": 14,
    "mlp.up_proj": 14,
    "mlp.down_proj": 20,
}
OUT_OF_MEMORY = "torch.OutOfMemoryError: tried to allocate 512 MiB with 214 MiB free"
# For a name that has to survive HTML, scripts and JSON.
HOSTILE = "<b>&\"'</script><!--"


@dataclass(frozen=True)
class Kind:
    """What an arm of the simulation is like."""

    name: str
    summary: str
    skill: float
    """Added to the log-odds of every answer."""
    trainable: int
    slowness: float
    uneven: bool = False
    failing: tuple[int, ...] = ()
    """Seeds whose run fails."""


ARMS = (
    Kind("lora", "lora r=16", 0.55, BUDGET, 1.0),
    Kind("dora", "dora r=16", 0.78, 4_921_344, 1.31, failing=(2,)),
    Kind("adalora", "PEFT ADALORA", 0.62, 4_880_000, 1.22, uneven=True),
    Kind("vera", "PEFT VERA r=256", 0.10, 612_480, 0.94),
    Kind("lora-xs", "lora_xs r=64", 0.50, 860_160, 0.9, failing=(0, 1, 2)),
)


def simulated(name: str = "Three tasks", arms: tuple[Kind, ...] = ARMS, seed: int = 0) -> Comparison:
    """Return a finished comparison of `arms` over three seeds and 500 items, the same whenever it is called."""
    chance = random.Random(seed)
    difficulty = [
        (f"{task}-{number}", task, chance.gauss(0.3 * place - 0.6, 1.4))
        for place, (task, items) in enumerate(TASKS.items())
        for number in range(items)
    ]
    base = _run(chance, Kind("base model", "", -0.35, 0, 1.0), 0, difficulty)
    base = replace(base, loss=[], trainable=None, file_bytes=None, steps=None, seconds_per_step=None, flops=None)
    base = replace(base, training_seconds=None, tokens_per_second=None, peak_bytes=None, energy_kwh=None)
    return Comparison(
        name=name,
        description="Does any other member of the family beat plain LoRA at the same number of parameters?",
        command="loraplex compare recipes/compare.yaml --output runs/compare",
        model="embedded (SmolLM2-135M-Instruct)",
        rows="4,800 rows of ARC-Easy, SST-2 and word reversal; tested on 500",
        budget="match: lora r=16",
        budget_parameters=BUDGET,
        reference=arms[0].name,
        seeds=SEEDS,
        arms=[_arm(chance, kind, difficulty) for kind in arms],
        base=base,
        environment={
            "python": "3.11.2",
            "system": "Linux x86_64",
            "device": "cpu",
            "threads": 2,
            "packages": {"loraplex": "0.1.0.dev0", "torch": "2.13.0", "peft": "0.21.0", "transformers": "5.23.0"},
        },
    )


def with_hostile_names(comparison: Comparison) -> Comparison:
    """Return `comparison` with text that breaks out of HTML, attributes and scripts wherever a user can put text."""
    reference, *others = comparison.arms
    runs = [
        replace(run, error=HOSTILE, state="failed", command=HOSTILE, tasks={HOSTILE: 0.5}) for run in reference.runs
    ]
    first = replace(reference, name=HOSTILE, summary=HOSTILE, runs=[*runs[:1], *reference.runs[1:]])
    return replace(
        comparison,
        **dict.fromkeys(("name", "description", "command", "model", "rows", "budget", "reference"), HOSTILE),
        arms=[first, *others],
        environment={HOSTILE: {HOSTILE: HOSTILE}},
    )


def _arm(chance: random.Random, kind: Kind, difficulty: list[tuple[str, str, float]]) -> Arm:
    runs = [_run(chance, kind, seed, difficulty) for seed in SEEDS]
    trials = [
        Trial(rate, 0.6 + 0.05 * kind.skill - 0.03 * math.log10(rate / 5e-4) ** 2 + chance.gauss(0, 0.004), 0.028)
        for rate in (2e-4, 5e-4, 1e-3)
    ]
    trials.append(Trial(5e-3, None, None, "the loss became NaN in step 31"))
    within = abs(kind.trainable / BUDGET - 1) <= 0.02
    return Arm(kind.name, kind.summary, 5e-4, kind.trainable, within, runs, trials)


def _run(chance: random.Random, kind: Kind, seed: int, difficulty: list[tuple[str, str, float]]) -> Run:
    command = (
        "loraplex train recipes/compare.yaml --adapter.adapter "
        f"'{kind.name}' --training.learning_rate 5e-4 --seed {seed} --output 'runs/compare/{kind.name}-seed-{seed}'"
    )
    if seed in kind.failing:
        return Run(seed, "failed", command, error=OUT_OF_MEMORY)
    luck = chance.gauss(0, 0.06)
    items = [
        Item(id, task, chance.random() < 1 / (1 + math.exp(hard - 2 * kind.skill - luck)))
        for id, task, hard in difficulty
    ]
    accuracy = sum(item.correct for item in items) / len(items)
    of_task = {task: [item.correct for item in items if item.task == task] for task in TASKS}
    per_step = 0.62 * kind.slowness * chance.uniform(0.97, 1.03)
    return Run(
        seed=seed,
        state="finished",
        command=command,
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / len(items)),
        tasks={task: sum(answers) / len(answers) for task, answers in of_task.items()},
        loss=[(step, _loss(chance, kind, step)) for step in range(1, STEPS + 1, 2)],
        trainable=kind.trainable,
        file_bytes=4 * kind.trainable + 21_000,
        steps=STEPS,
        seconds_per_step=per_step,
        training_seconds=STEPS * per_step * 1.04,
        tokens_per_second=1180 / per_step,
        peak_bytes=int(9.1e8 * kind.slowness),
        flops=1.9e14 * kind.slowness,
        energy_kwh=0.0021 * kind.slowness if seed == 0 else None,
        ranks=_ranks(chance, kind),
        items=items,
    )


def _loss(chance: random.Random, kind: Kind, step: int) -> float:
    return 0.9 - 0.15 * kind.skill + 1.3 * math.exp(-step / (70 - 20 * kind.skill)) + chance.gauss(0, 0.09)


def _ranks(chance: random.Random, kind: Kind) -> dict[str, int]:
    sites = {f"model.layers.{layer}.{name}": rank for layer in range(LAYERS) for name, rank in KINDS.items()}
    if not kind.uneven:
        return dict.fromkeys(sites, 16)
    layer = {site: int(site.split(".")[2]) for site in sites}
    return {site: max(0, round(rank * (0.4 + layer[site] / 24) + chance.gauss(0, 2))) for site, rank in sites.items()}
