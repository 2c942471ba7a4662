"""Start-up: whole processes, from the command to its end."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

from benchmarks import results
from benchmarks.ratios import Comparison, judged
from benchmarks.results import Plan
from benchmarks.rounds import Record
from benchmarks.terminal import errors, output

GOALS = {"loraplex --help": 0.25, "import loraplex": 0.1}
"""Seconds at most."""


def commands() -> dict[str, list[str]]:
    """Return the commands by name; TRL's is left out where it is not installed."""
    found = {
        "loraplex --help": [_script("loraplex"), "--help"],
        "import loraplex": [sys.executable, "-c", "import loraplex"],
        "python": [sys.executable, "-c", "pass"],
        "trl --help": [_script("trl"), "--help"],
    }
    return {name: command for name, command in found.items() if shutil.which(command[0])}


def _script(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def run(plan: Plan) -> None:
    """Time all commands in turn, print the table and write `startup.json`."""
    beginning = results.header("startup", plan)
    todo = commands()
    records = {name: Record(loaded_bytes=0) for name in todo}
    with Progress(console=errors, transient=True) as bar:
        shown = bar.add_task("start-up", total=(plan.warm_up + plan.rounds) * len(todo))
        for index in range(plan.warm_up + plan.rounds):
            for name, command in todo.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                if index >= plan.warm_up:
                    records[name].seconds.append(time.perf_counter() - start)
                    records[name].amounts.append(1)
                bar.advance(shown)
    comparisons = [Comparison("loraplex --help", "trl --help")]
    result = results.contest(beginning, records, comparisons, unit="starts")
    result["seconds"] = {name: judged(record.seconds, "time", GOALS.get(name)) for name, record in records.items()}
    show(result)
    results.write(result, plan)


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("command", "median s", "95 % interval", "goal")
    for name, entry in result["seconds"].items():
        table.add_row(
            name, f"{entry['median']:.3f}", results.bounds(entry), results.goal({**entry, "quantity": "time"})
        )
    output.print(table)
