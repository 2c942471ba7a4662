"""The entry point: a group that loads a command only when it is called, and the one place where errors become text."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import click

from loraplex import __version__
from loraplex.errors import UserError, nearest

# What a full disk or a folder without permission raises: the user's to mend, so one line and no traceback.
_USERS_OWN_OSERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}


class LazyCommand(NamedTuple):
    """Where a command lives, and its line in `loraplex --help`."""

    target: str  # "module:attribute", the attribute a click command
    summary: str


COMMANDS = {
    "demo": LazyCommand("loraplex.cli.demo:demo", "The first five minutes: train, compare, save, reload."),
    "train": LazyCommand("loraplex.cli.train:train", "Train an adapter as a recipe says."),
    "eval": LazyCommand("loraplex.cli.evaluate:evaluate", "Measure an adapter's accuracy, with standard errors."),
    "plan": LazyCommand("loraplex.cli.plan:plan", "Show sites, ranks, parameters, memory and time before training."),
    "heads": LazyCommand("loraplex.cli.heads:heads", "Suggest a number of heads from the groups in a data set."),
    "compare": LazyCommand("loraplex.cli.compare:compare", "Compare methods under one budget, with evidence."),
    "report": LazyCommand("loraplex.cli.report:report", "Write the report of finished comparisons again."),
    "export": LazyCommand("loraplex.cli.export:export", "Write an adapter for PEFT, vLLM, transformers or llama.cpp."),
    "inspect": LazyCommand("loraplex.cli.inspect:inspect", "Show sites, ranks, spectra and ways out of an adapter."),
    "generate": LazyCommand("loraplex.cli.generate:generate", "Let a model with an adapter continue a prompt."),
    "methods": LazyCommand("loraplex.cli.methods:methods", "List the methods and what each of them can do."),
}


class Interrupted(click.ClickException):
    """Ctrl-C, with what the interrupted command had to say about it."""

    exit_code = 130

    def format_message(self) -> str:
        """Return "interrupted", followed by the command's own words if there are any."""
        return f"interrupted: {self.message}" if self.message else "interrupted"


class LazyGroup(click.Group):
    """A click group over `COMMANDS`: the list needs no import, a call imports the one module it needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command `cmd_name`, or None when there is none."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name].target.split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), COMMANDS[cmd_name].target
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve the first argument to a command; an unknown one is an error that names the nearest."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            known = nearest(name, COMMANDS) or f" The commands are: {', '.join(COMMANDS)}."
            raise click.UsageError(f"there is no command '{name}'.{known}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands from data, without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what the user can mend leaves as a one-line message unless a traceback was asked for."""
        try:
            with _plain_reports(debug=ctx.params["traceback"]):
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise Interrupted(str(interrupt)) from interrupt
        except (UserError, OSError) as error:
            is_ours = isinstance(error, UserError) or error.errno in _USERS_OWN_OSERRORS
            if ctx.params["traceback"] or not is_ours:
                raise
            raise click.ClickException(str(error)) from error


@contextlib.contextmanager
def _plain_reports(debug: bool) -> Iterator[None]:
    """Print our warnings and log messages as single lines; leave out what other packages announce to developers."""
    import logging

    handler = logging.StreamHandler()
    logger = logging.getLogger("loraplex")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.filterwarnings("ignore", category=FutureWarning, module="(?!loraplex)")
                warnings.showwarning = _show_warning
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _show_warning(message: Warning | str, *where: object, **others: object) -> None:
    click.echo(f"warning: {' '.join(str(message).split())}", err=True)


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="loraplex")
@click.option("--traceback", is_flag=True, envvar="LORAPLEX_DEBUG", help="Show where an error came from.")
@click.pass_context
def cli(ctx: click.Context, traceback: bool) -> None:
    """Train, compare and deploy the whole LoRA family on Hugging Face models."""
    # Read by GNU OpenMP when torch is imported. Threads that wait by spinning for long take the cores from whoever has
    # work: beside another busy process a training step took five times as long.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Usage statistics are the user's to give. In a program they are the program's to set.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit status.

    0 is success, 1 an error the user can mend, 2 a command line that makes no sense, 130 an interruption.
    """
    try:
        status = cli.main(args=argv, prog_name="loraplex", standalone_mode=False)
    except Interrupted as interrupt:
        click.echo(interrupt.format_message(), err=True)
        return interrupt.exit_code
    except click.Abort:
        click.echo("interrupted", err=True)
        return Interrupted.exit_code
    except click.ClickException as error:
        click.echo(f"error: {_one_line(error)}", err=True)
        return error.exit_code
    return status if isinstance(status, int) else 0


def _one_line(error: click.ClickException) -> str:
    """Return the message of `error` on one line, with the way to the help for a wrong command line."""
    text = " ".join(error.format_message().split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        text += f" ('{error.ctx.command_path} --help' shows what there is)"
    return text
