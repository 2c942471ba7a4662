"""Contestants in turn: every round goes through all of them, one process working at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.progress import Progress

from benchmarks.terminal import errors
from benchmarks.workload import THREADS

ROOT = Path(__file__).resolve().parent.parent
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(THREADS)}

_LOSS_TOLERANCE = 0.02
"""Of the first losses: bfloat16 rounds differently with padding, autocast and the order of sums."""


class ContestantError(Exception):
    """A contestant's process ended before the benchmark did."""


@dataclass
class Record:
    """What was measured of one contestant; the lists have one entry a counted round."""

    loaded_bytes: int
    """Size of its process with the model loaded, before the first round."""
    peak_bytes: int = 0
    """The largest size it had since then, warm-up included."""
    seconds: list[float] = field(default_factory=list)
    amounts: list[int] = field(default_factory=list)
    """Real tokens, or items, of each round."""
    first_loss: float | None = None
    """Loss of the very first round, where every contestant's adapter is still without effect."""
    extra: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Real tokens, or items, per second over all counted rounds."""
        return sum(self.amounts) / sum(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON, with its rate."""
        return {"rate": self.rate, **asdict(self)}


class Worker:
    """A contestant's process, from its start to its end."""

    def __init__(self, name: str, module: str, work: Mapping[str, Any]) -> None:
        self.name = name
        # A file and not a pipe: nobody reads it while the process runs.
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(work)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **_ENVIRONMENT},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        # Closes stdin, upon which the process ends by itself.
        self._process.communicate()
        self._log.close()

    def answer(self) -> dict[str, Any]:
        """Wait for the process to be idle and return what it reports.

        Raises:
            ContestantError: it has ended, with the end of what it wrote.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise ContestantError(f"{self.name} ended early:\n" + "".join(self._log.readlines()[-15:]))
        answered: dict[str, Any] = json.loads(line)
        return answered

    def take_turn(self) -> dict[str, Any]:
        """Let it do one round and return the result."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.is_target()


def alternate(
    module: str, contestants: Mapping[str, Mapping[str, Any]], *, rounds: int, warm_up: int, title: str
) -> dict[str, Record]:
    """Run `module` once for every contestant and give them their rounds in turn; return their records by name.

    Raises:
        ContestantError: one of them ended early, or does other work than the others.
    """
    from contextlib import ExitStack

    with ExitStack() as stack, Progress(console=errors, transient=True) as bar:
        shown = bar.add_task(title, total=len(contestants) * (1 + warm_up + rounds))
        workers: list[Worker] = []
        records: dict[str, Record] = {}
        for name, work in contestants.items():
            bar.update(shown, description=f"{title}: {name} starts")
            workers.append(stack.enter_context(Worker(name, module, work)))
            # One after the other, so that nobody loads while another one is measured.
            records[name] = Record(loaded_bytes=int(workers[-1].answer()["loaded_bytes"]))
            bar.advance(shown)
        for index in range(warm_up + rounds):
            for worker in workers:
                bar.update(shown, description=f"{title}: {worker.name}")
                _enter(records[worker.name], worker.take_turn(), first=index == 0, counted=index >= warm_up)
                bar.advance(shown)
            if index == 0:
                _check_first_losses(records)
    if len(amounts := {tuple(record.amounts) for record in records.values()}) > 1:
        raise ContestantError(f"the contestants had rounds of different sizes: {sorted(amounts)}")
    return records


def _enter(record: Record, result: dict[str, Any], *, first: bool, counted: bool) -> None:
    record.peak_bytes = max(record.peak_bytes, int(result.pop("peak_bytes")))
    loss = result.pop("loss", None)
    if first:
        record.first_loss = loss
    seconds, amount = float(result.pop("seconds")), int(result.pop("amount"))
    if counted:
        record.seconds.append(seconds)
        record.amounts.append(amount)
        if result:
            record.extra.append(result)


def _check_first_losses(records: Mapping[str, Record]) -> None:
    """Make sure, early, that all contestants compute the same; their adapters have no effect before the first step."""
    losses = {name: record.first_loss for name, record in records.items() if record.first_loss is not None}
    if losses and max(losses.values()) > (1 + _LOSS_TOLERANCE) * min(losses.values()):
        raise ContestantError(f"the contestants' first losses differ by more than {_LOSS_TOLERANCE:.0%}: {losses}")
