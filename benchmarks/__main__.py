"""The command line of the benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import click

from benchmarks.results import COMMITTED, Plan
from benchmarks.rounds import ContestantError
from benchmarks.terminal import errors
from loraplex.errors import UserError

_TRAINING = ("lora", "dora", "pair", "compact", "hydra", "echo")
_ALLOCATION = ("scoring", "steps")
_QUICK = Plan(rounds=2, warm_up=1, quick=True)


def _options(command: Any) -> Any:
    """Add the options that all measurements share."""
    command = click.option("--quick", is_flag=True, help="Two rounds, fewer cases: shows that it works.")(command)
    return click.option("--rounds", type=click.IntRange(1), help="Counted rounds.")(command)


def _plan(rounds: int | None, quick: bool, default: int = 9, warm_up: int = 2) -> Plan:
    plan = _QUICK if quick else Plan(default, warm_up)
    return Plan(rounds or plan.rounds, plan.warm_up, plan.quick)


@click.group()
def main() -> None:
    """Measure loraplex against its peers, in alternated rounds, on an idle machine."""


@main.command()
@_options
@click.option("--only", type=click.Choice(_TRAINING), help="One part; pair: our DoRA beside our LoRA.")
def training(rounds: int | None, quick: bool, only: str | None) -> None:
    """Training steps against the limit and against TRL with PEFT."""
    from benchmarks.training import run

    for part in (only,) if only else _TRAINING:
        run(part, _plan(rounds, quick, default=45 if part in ("pair", "hydra", "echo") else 9))


@main.command()
@_options
def layers(rounds: int | None, quick: bool) -> None:
    """Single layers against PEFT's."""
    from benchmarks.layers import run

    run(_plan(rounds, quick))


@main.command("routed-layers")
@_options
def routed_layers(rounds: int | None, quick: bool) -> None:
    """Single layers with a router against loops over the heads."""
    from benchmarks.routed_layers import run

    run(_plan(rounds, quick, default=15))


@main.command()
@_options
@click.option("--only", type=click.Choice(_ALLOCATION), help="One part: what scoring costs, or the steps between.")
def allocation(rounds: int | None, quick: bool, only: str | None) -> None:
    """Scoring against passes of training, and steps with an allocation against steps without."""
    from benchmarks.allocation import run

    for part in (only,) if only else _ALLOCATION:
        run(part, _plan(rounds, quick, default=25 if part == "steps" else 9))


@main.command()
@_options
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
def evaluation(rounds: int | None, quick: bool, dtype: Literal["bfloat16", "float32"]) -> None:
    """Option scoring against lm-evaluation-harness."""
    from benchmarks.evaluation import run

    run(_plan(rounds, quick), dtype)


@main.command()
@_options
def startup(rounds: int | None, quick: bool) -> None:
    """Commands from their start to their end."""
    from benchmarks.startup import run

    run(_plan(rounds, quick))


@main.command()
@_options
def growth(rounds: int | None, quick: bool) -> None:
    """Step and memory against rank, length and number of sites, half an hour."""
    from benchmarks.growth import run

    run(_plan(rounds, quick, warm_up=1))


@main.command()
@_options
def power(rounds: int | None, quick: bool) -> None:
    """False positives and power of the comparison's tests, by simulation; a round is a repetition, 2000 by default."""
    from benchmarks.power import run

    run(_plan(rounds, quick, default=2000, warm_up=0))


@main.command()
@click.option("--results", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path), default=COMMITTED)
def report(folder: Path) -> None:
    """Fill docs/performance.md and its plots from the results."""
    from benchmarks.report import run

    run(folder)


if __name__ == "__main__":
    try:
        main(prog_name="python -m benchmarks", standalone_mode=False)
    except UserError as error:
        # The benchmark sets, or an optional package, are not here.
        errors.print(f"skipped: {error}", markup=False)
    except (click.ClickException, ContestantError) as error:
        errors.print(f"error: {error}", markup=False)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
