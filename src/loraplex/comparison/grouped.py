"""An arm with one adapter for each group of prompts: its runs in parts, and the parts as one run.

The control of routed adapters: rows are divided before training, by k-means over the words of their prompts, and each
group has an adapter of its own. A test item is answered by the adapter of the group that it is nearest to. Together the
adapters have the parameters of one arm and do its number of steps, each in proportion to its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loraplex.comparison.results import Run
from loraplex.evaluation.results import Accuracies
from loraplex.training.recipe import Recipe


def parts(recipe: Recipe, sizes: Sequence[int]) -> list[Recipe]:
    """Return the recipe of each group's adapter; `sizes` are the training rows of the groups."""
    steps = recipe.training.max_steps
    found = []
    for index, size in enumerate(sizes):
        share = None if steps is None else max(1, round(steps * size / sum(sizes)))
        data = replace(recipe.data, group=f"{index + 1}/{len(sizes)}")
        found.append(replace(recipe, data=data, training=replace(recipe.training, max_steps=share)))
    return found


def joined(runs: Sequence[Run], order: Sequence[str]) -> Run:
    """Return the runs of the groups as one run over all items, in the order of their ids in `order`, others last.

    Parameters, bytes, steps, seconds and operations are sums, the memory is the largest one's. The loss is the mean
    over the adapters when each has done the same part of its steps, weighed by these.
    """
    if unfinished := next((run for run in runs if run.state != "finished"), None):
        command = " && ".join(run.command for run in runs)
        error = next((run.error for run in runs if run.error), None)
        return Run(unfinished.seed, "failed" if error else "missing", command, error=error)
    place = {item: index for index, item in enumerate(order)}
    items = sorted((item for run in runs for item in run.items), key=lambda item: place.get(item.id, len(place)))
    found = Accuracies.of([item.correct for item in items], [item.task for item in items]) if items else None
    seconds = sum(run.training_seconds or 0 for run in runs)
    steps = sum(map(_steps, runs))
    tokens = sum((run.tokens_per_second or 0) * (run.training_seconds or 0) for run in runs)
    energy = [run.energy_kwh for run in runs if run.energy_kwh is not None]
    return Run(
        seed=runs[0].seed,
        state="finished",
        command=" && ".join(run.command for run in runs),
        accuracy=found.overall.value if found else None,
        standard_error=found.overall.standard_error if found else None,
        tasks={task: part.value for task, part in found.per_task.items()} if found and len(found.per_task) > 1 else {},
        loss=_at_equal_progress(runs),
        trainable=sum(run.trainable or 0 for run in runs),
        deployed=sum(run.parameters or 0 for run in runs),
        file_bytes=sum(run.file_bytes or 0 for run in runs),
        steps=steps,
        seconds_per_step=seconds / steps if steps else None,
        training_seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else None,
        peak_bytes=max(run.peak_bytes or 0 for run in runs),
        flops=sum(run.flops or 0 for run in runs),
        energy_kwh=sum(energy) if energy else None,
        ranks=runs[0].ranks,
        items=items,
    )


def _at_equal_progress(runs: Sequence[Run]) -> list[tuple[int, float]]:
    if not all(run.loss for run in runs):
        return []
    longest = max(runs, key=_steps)
    total = sum(map(_steps, runs))
    curve = []
    for step, _ in longest.loss:
        mean = sum(_steps(run) * _loss_at(run, step, _steps(longest)) for run in runs) / total
        curve.append((round(total * step / _steps(longest)), mean))
    return curve


def _loss_at(run: Run, done: int, of: int) -> float:
    """Return the first loss that was logged when at least `done` / `of` of the steps were done."""
    return next((loss for step, loss in run.loss if step * of >= done * _steps(run)), run.loss[-1][1])


def _steps(run: Run) -> int:
    return run.steps or 0
