"""From the folders of finished jobs to the plain data of `results.py`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from loraplex.comparison.jobs import Job
from loraplex.comparison.results import Item, Run
from loraplex.training.folder import RunFolder

WEIGHTS = "adapter_model.safetensors"


def collect(job: Job, error: str | None = None) -> Run:
    """Return what became of a training run."""
    command = f"loraplex train {shlex.quote(str(job.file))} --output runs/{job.name}"
    seed = job.recipe.seed
    if not job.finished:
        return Run(seed, "failed" if error else "missing", command, error=error)
    metrics, folder = job.metrics(), RunFolder(job.folder)
    accuracy, speed, memory = metrics["accuracy"]["after"], metrics["speed"], metrics["memory"]
    per_task = {task: entry["value"] for task, entry in (accuracy or {}).get("per_task", {}).items()}
    return Run(
        seed=seed,
        state="finished",
        command=command,
        accuracy=accuracy["value"] if accuracy else None,
        standard_error=accuracy["standard_error"] if accuracy else None,
        tasks=per_task,
        loss=[(entry["step"], entry["loss"]) for entry in metrics["loss"]],
        trainable=metrics["parameters"]["trainable"],
        deployed=metrics["parameters"].get("deployed"),
        file_bytes=(folder.adapter / WEIGHTS).stat().st_size,
        steps=metrics["steps"],
        seconds_per_step=speed["seconds_per_step"],
        training_seconds=metrics["seconds"]["training"],
        tokens_per_second=speed["tokens_per_second"],
        peak_bytes=max(0, memory["peak_bytes"] - memory["resident_after_loading_bytes"]),
        flops=metrics["flops_per_token"] * speed["tokens"],
        energy_kwh=metrics.get("energy_kwh"),
        ranks=_ranks(folder.plan),
        items=_items(folder),
    )


def collect_base(job: Job, error: str | None = None) -> Run | None:
    """Return what the base model reaches without an adapter, None where nothing is measured."""
    if not job.finished:
        return Run(job.recipe.seed, "failed", "", error=error) if error else None
    accuracy = job.metrics()["accuracy"]["after"]
    return Run(
        seed=job.recipe.seed,
        state="finished",
        command="",
        accuracy=accuracy["value"],
        standard_error=accuracy["standard_error"],
        tasks={task: entry["value"] for task, entry in accuracy["per_task"].items()},
        items=_items(RunFolder(job.folder)),
    )


def environment(jobs: list[Job]) -> dict[str, Any]:
    """Return versions and machine as the first finished run has recorded them."""
    for job in jobs:
        path = RunFolder(job.folder).environment
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
    return {}


def _ranks(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    ranks: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))["ranks"]
    return ranks


def _items(folder: RunFolder) -> list[Item]:
    path = folder.evaluation / "after.jsonl"
    if not path.is_file():
        return []
    records = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    # an item that has a loss alone is neither right nor wrong
    answered = (record for record in records if "correct" in record)
    return [Item(record["source"], record.get("task", ""), bool(record["correct"])) for record in answered]
