"""The charts of a comparison: which there are, and what each of them shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import altair as alt

from loraplex.analysis.rank_map import height, rank_cells, rank_heat
from loraplex.comparison.curves import course
from loraplex.comparison.results import Comparison
from loraplex.comparison.scatter import against_parameters, against_time
from loraplex.comparison.scene import ChartContext, Plot, close_scale, interval, percent, percent_axis
from loraplex.comparison.summary import Summary


def draw(comparison: Comparison, summary: Summary, names: Sequence[str], *, legends: bool) -> list[Plot]:
    """Return all charts that the comparison has data for, in the order of the report."""
    scene = ChartContext(comparison, summary, names, legends)
    drawn: list[Plot | None] = []
    if summary.arms:
        drawn += [_accuracy(scene), against_parameters(scene), against_time(scene)]
    drawn += [_learning_curves(scene), _tasks(scene), *_rank_maps(scene), _trials(scene)]
    return [plot for plot in drawn if plot is not None]


def _accuracy(scene: ChartContext) -> Plot:
    # The names are in the chart itself.
    scene = replace(scene, legends=False)
    comparison, order = scene.comparison, scene.order()
    means, seeds = [], []
    for row in scene.summary.arms:
        means.append(
            {"arm": row.arm, "name": scene.called(row.arm), "mean": row.mean, **interval(row)}
            | {"number": f"{100 * row.mean:.1f} %", "reference": row.arm == comparison.reference}
        )
        seeds += [
            {"arm": row.arm, "seed": run.seed, "accuracy": run.accuracy}
            for run in scene.finished(comparison.arm(row.arm))
        ]
    rows = scene.base(means)
    across = alt.X("mean:Q", title="accuracy", axis=percent_axis(), scale=close_scale())
    down = alt.Y("arm:N", sort=order, axis=None)
    tooltip = [alt.Tooltip("arm:N"), *percent(mean="mean", low="95 % from", high="95 % to")]
    reference = rows.transform_filter("datum.reference").mark_rule(style="front").encode(x=across)
    span = rows.mark_rule(strokeWidth=6, opacity=0.3, strokeCap="round", yOffset=9)
    mean = rows.mark_point(size=150, filled=True, opacity=1, yOffset=9)
    point = scene.base(seeds).mark_point(size=34, filled=True, opacity=0.55, yOffset=9)
    layers = [
        reference,
        span.encode(y=down, x=alt.X("low:Q", scale=close_scale()), x2="high:Q", color=scene.color()),
        point.encode(
            y=down,
            x=alt.X("accuracy:Q"),
            color=scene.color(),
            tooltip=[alt.Tooltip("arm:N"), alt.Tooltip("seed:O"), *percent(accuracy="accuracy")],
        ),
        mean.encode(y=down, x=across, color=scene.color(), shape=scene.shape(), tooltip=tooltip),
        rows.mark_text(align="left", dy=-13, style="name", limit=alt.ExprRef("width - 60")).encode(
            y=down, x=alt.value(0), text="name:N"
        ),
        rows.mark_text(align="right", dy=-13, style="number").encode(
            y=down, x=alt.value(alt.ExprRef("width")), text="number:N"
        ),
    ]
    caption = "Large marks are means over the seeds, small ones single seeds, bars 95 % intervals of the mean."
    if comparison.base is not None and comparison.base.accuracy is not None:
        caption += f" Without any adapter the model gets {100 * comparison.base.accuracy:.1f} %."
    chart = scene.layered(*layers, height=58 * len(means), description=caption)
    return Plot("accuracy", "Accuracy", caption, chart)


def _learning_curves(scene: ChartContext) -> Plot | None:
    means, seeds = [], []
    for arm in scene.comparison.arms:
        curves = {run.seed: course(run.loss) for run in arm.runs if run.loss}
        by_step: dict[int, list[float]] = {}
        for seed, curve in curves.items():
            seeds += [{"arm": arm.name, "seed": seed, "step": step, "loss": loss} for step, loss in curve]
            for step, loss in curve:
                by_step.setdefault(step, []).append(loss)
        # Only steps that all seeds have reached: a mean over other seeds is a jump that nobody trained.
        means += [
            {"arm": arm.name, "step": step, "loss": round(fmean(losses), 4)}
            for step, losses in sorted(by_step.items())
            if len(losses) == len(curves)
        ]
    if not means:
        return None
    across = alt.X("step:Q", title="optimizer step", scale=alt.Scale(nice=False))
    up = alt.Y("loss:Q", title="training loss (nats per token)", scale=alt.Scale(zero=False))
    faint = scene.base(seeds).mark_line(strokeWidth=1, opacity=0.28).encode(x=across, y=up, color=scene.color())
    bold = (
        scene.base(means)
        .mark_line(strokeWidth=2.2)
        .encode(
            x=across,
            y=up,
            color=scene.color(),
            tooltip=[alt.Tooltip("arm:N"), alt.Tooltip("step:Q"), alt.Tooltip("loss:Q", format=".3f")],
        )
    )
    caption = "Bold lines are means over the seeds, faint ones single seeds; lightly smoothed."
    chart = scene.layered(
        faint.encode(detail="seed:N"), bold, height=320, description=f"Training loss over steps. {caption}"
    )
    return Plot("learning-curves", "Learning curves", caption, chart)


def _tasks(scene: ChartContext) -> Plot | None:
    runs = [(arm, run) for arm in scene.comparison.arms for run in scene.finished(arm)]
    tasks = list(dict.fromkeys(task for _, run in runs for task in run.tasks))
    if len(tasks) < 2:
        return None
    seeds: list[dict[str, Any]] = [
        {"arm": arm.name, "seed": run.seed, "task": task, "accuracy": accuracy}
        for arm, run in runs
        for task, accuracy in run.tasks.items()
    ]
    cells: dict[tuple[str, str], list[float]] = {}
    for row in seeds:
        cells.setdefault((row["arm"], row["task"]), []).append(row["accuracy"])
    means = [{"arm": arm, "task": task, "mean": fmean(values)} for (arm, task), values in cells.items()]
    axis = alt.Axis(labelLimit=110, labelFontSize=12, grid=False)
    down = alt.Y("task:N", sort=tasks, title=None, axis=axis, scale=alt.Scale(paddingInner=0.22))
    offset = alt.YOffset("arm:N", sort=scene.order())
    across = alt.X("mean:Q", title="accuracy", axis=percent_axis(), scale=alt.Scale(zero=True))
    bars = (
        scene.base(means)
        .mark_bar(cornerRadiusEnd=2, opacity=0.6)
        .encode(
            x=across,
            y=down,
            yOffset=offset,
            color=scene.color(),
            tooltip=[alt.Tooltip("arm:N"), alt.Tooltip("task:N"), *percent(mean="accuracy")],
        )
    )
    points = (
        scene.base(seeds)
        .mark_tick(style="seed")
        .encode(
            x=alt.X("accuracy:Q", title="accuracy"),
            y=down,
            yOffset=offset,
            tooltip=[
                alt.Tooltip("arm:N"),
                alt.Tooltip("task:N"),
                alt.Tooltip("seed:O"),
                *percent(accuracy="accuracy"),
            ],
        )
    )
    caption = "Bars are means over the seeds, ticks single seeds."
    height = len(tasks) * (17 * len({row["arm"] for row in means}) + 18)
    chart = scene.layered(bars, points, height=height, description=f"Accuracy per task. {caption}")
    return Plot("tasks", "Accuracy per task", caption, chart)


def _rank_maps(scene: ChartContext) -> list[Plot]:
    """Return a map per arm whose ranks are not the same everywhere; all maps share one scale."""
    maps = {}
    for arm in scene.comparison.arms:
        ranks = [run.ranks for run in scene.finished(arm) if run.ranks]
        if any(len(set(of_run.values())) > 1 for of_run in ranks):
            maps[arm.name] = rank_cells(ranks)
    highest = max((cell.rank for cells in maps.values() for cell in cells), default=0)
    plots = []
    for number, (name, cells) in enumerate(maps.items(), 1):
        caption = "Rank of every adapted matrix at the end of training, mean over the seeds."
        heat = rank_heat(scene.base([{"arm": name, **cell._asdict()} for cell in cells]), cells, highest)
        description = f"Ranks per layer and kind of matrix of one arm. {caption}"
        chart = scene.layered(heat, height=height(cells), description=description)
        plots.append(Plot(f"ranks-{number}", f"Ranks of {name}", caption, chart, arm=name))
    return plots


def _trials(scene: ChartContext) -> Plot | None:
    rows: list[dict[str, Any]] = [
        {"arm": arm.name, "rate": trial.learning_rate, "accuracy": trial.accuracy, "deviation": trial.standard_error}
        | {"error": trial.error, "chosen": math.isclose(trial.learning_rate, arm.learning_rate)}
        for arm in scene.comparison.arms
        for trial in arm.trials
    ]
    found = [row for row in rows if row["accuracy"] is not None]
    failed = [row for row in rows if row["accuracy"] is None]
    if not found:
        return None
    low, high = min(row["accuracy"] for row in found), max(row["accuracy"] for row in found)
    step = max(high - low, 0.01) / 14
    # Below everything else, the crosses of one rate on top of each other.
    stacked: dict[float, int] = {}
    for row in failed:
        row["place"] = low - step * (2 + stacked.setdefault(row["rate"], 0))
        stacked[row["rate"]] += 1
    bottom = low - step * (2 + max(stacked.values(), default=0))
    # Ticks at what was tried: powers of ten in between would be empty.
    rates = sorted({row["rate"] for row in rows})
    axis = alt.Axis(values=rates, format="~e", grid=True)
    domain = [rates[0] / 1.2, rates[-1] * 1.2]
    across = alt.X("rate:Q", title="learning rate", scale=alt.Scale(type="log", domain=domain, nice=False), axis=axis)
    up = alt.Y("accuracy:Q", title="validation accuracy", axis=percent_axis())
    up = up.scale(alt.Scale(domain=[max(bottom, 0), high + 1.5 * step], nice=False, zero=False))
    base = scene.base(found)
    lines = base.mark_line(strokeWidth=1.5, opacity=0.6).encode(x=across, y=up, color=scene.color())
    rings = base.transform_filter("datum.chosen").mark_point(size=260, style="ring", shape="circle")
    rate = [alt.Tooltip("arm:N"), alt.Tooltip("rate:Q", title="learning rate", format="~e")]
    points = base.mark_point(size=100, filled=True, opacity=1).encode(
        x=across,
        y=up,
        color=scene.color(),
        shape=scene.shape(),
        tooltip=[*rate, *percent(accuracy="accuracy", deviation="standard error")],
    )
    crosses = scene.base(failed).mark_text(text="×", fontSize=18, fontWeight="bold", baseline="middle")
    crosses = crosses.encode(
        x=across,
        y=alt.Y("place:Q", title="validation accuracy"),
        color=scene.color(),
        tooltip=[*rate, alt.Tooltip("error:N")],
    )
    caption = "Every arm was tried with each learning rate on validation items; the ringed one was taken."
    deviations = [row["deviation"] for row in found if row["deviation"] is not None]
    if deviations:
        caption += f" The standard error of a point is about {100 * fmean(deviations):.1f} percentage points."
    if failed:
        errors = dict.fromkeys(row["error"] or "no message" for row in failed)
        caption += f" A cross is a trial that failed ({'; '.join(errors)})."
    layers = [lines, rings.encode(x=across, y=up), points, *([crosses] if failed else [])]
    chart = scene.layered(*layers, height=300, description=f"Learning rates tried. {caption}")
    return Plot("learning-rates", "Learning rates tried", caption, chart)
