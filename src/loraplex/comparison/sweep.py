"""Carries out the jobs of a comparison: several at a time if there are cores, a failure ends none of the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from loraplex.comparison.jobs import Job
from loraplex.comparison.worker import INTERRUPTED, STEP
from loraplex.comparison.workers import Workers

# Cores that a single run makes good use of.
CORES_PER_RUN = 8

Progress = Callable[[Job, int], None]
"""Told the job and the number of optimizer steps that have been added."""


def default_jobs() -> int:
    """Return how many runs go on at the same time: one on an accelerator, on a CPU as many as the cores allow."""
    import torch

    return 1 if torch.cuda.is_available() else max(1, (os.cpu_count() or 1) // CORES_PER_RUN)


def make_workers(at_once: int) -> Workers:
    """Return workers for so many jobs at the same time, which share the cores."""
    return Workers(max(1, (os.cpu_count() or 1) // at_once) if at_once > 1 else None)


def run_jobs(
    jobs: Sequence[Job],
    at_once: int,
    logs: Path,
    workers: Workers,
    progress: Progress = lambda job, steps: None,
) -> dict[str, str]:
    """Carry out the jobs, `at_once` at the same time, and return the error of each that failed, by its name.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after the running jobs have saved their state.
    """
    logs.mkdir(parents=True, exist_ok=True)
    errors: dict[str, str] = {}
    if jobs:
        workers.prepare()
    with ThreadPoolExecutor(at_once) as pool:
        running: dict[Future[str | None], Job] = {pool.submit(_run, job, logs, workers, progress): job for job in jobs}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, error = running.pop(future), future.result()
                    if error is not None:
                        errors[job.name] = error
        except KeyboardInterrupt:
            # The jobs got the signal too: they are of the same process group.
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return errors


def _run(job: Job, logs: Path, workers: Workers, progress: Progress) -> str | None:
    """Carry out one job and return its error, None when it finished."""
    log = logs / f"{job.name}.log"
    arguments = [job.kind, str(job.file), str(job.folder)]
    with log.open("w", encoding="utf-8") as errors, workers.start(arguments, errors) as running:
        before: int | None = None
        for line in running.output:
            if line.startswith(STEP):
                step = int(line.removeprefix(STEP))
                # A resumed run starts in the middle: what lies before counts when its first step does.
                progress(job, step - (before or 0))
                before = step
    status = running.process.returncode
    if status == INTERRUPTED:
        return "interrupted; the same command goes on with it"
    if status != 0 or not job.finished:
        return _last_line(log) or f"ended with status {status}, see {log}"
    job.record()
    # those that no line has told: of a job that does not train, and of one that had been trained before
    progress(job, job.steps - (before or 0))
    return None


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ")[:500] if lines else ""
