"""The entry point: a command is imported when it is called, and here alone errors become text.

Only the standard library is imported until the command's extra is found, so that every help page is there without it.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from loraplex import __version__
from loraplex.cli.arguments import Parser, WrongUsageError
from loraplex.errors import UserError, nearest
from loraplex.extras import require

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


class Command(NamedTuple):
    """Where a command lives, its line in `loraplex --help`, and what has to be installed for it."""

    module: str
    """It has `parser(prog)` and `run(arguments)`, and imports the standard library until `run` is called."""
    summary: str
    extras: tuple[str, ...] = ()


# In the order in which a newcomer meets them.
COMMANDS = {
    "demo": Command("loraplex.cli.demo", "The first five minutes: train, compare, save, reload.", ("train", "tasks")),
    "train": Command("loraplex.cli.train", "Train an adapter as a recipe says.", ("train",)),
    "eval": Command("loraplex.cli.evaluate", "Measure an adapter's accuracy, with standard errors.", ("train",)),
    "plan": Command("loraplex.cli.plan", "Show sites, ranks, parameters, memory and time before training.", ("train",)),
    "heads": Command("loraplex.cli.heads", "Suggest a number of heads from the groups in a data set.", ("analysis",)),
    "compare": Command("loraplex.cli.compare", "Compare methods under one budget, with evidence.", ("compare",)),
    "report": Command("loraplex.cli.report", "Write the report of finished comparisons again.", ("compare",)),
    "export": Command("loraplex.cli.export", "Write an adapter for PEFT, vLLM, transformers, llama.cpp.", ("export",)),
    "inspect": Command("loraplex.cli.inspect", "Show sites, ranks, spectra and ways out of an adapter.", ("analysis",)),
    "generate": Command("loraplex.cli.generate", "Let a model with an adapter continue a prompt."),
    "methods": Command("loraplex.cli.methods", "List the methods and what each of them can do.", ("train",)),
}
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit status.

    0 is success, 1 an error the user can mend, 2 a command line that makes no sense, 130 an interruption.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # The options of loraplex itself take no values: they end where the first word without dashes stands.
    own = next((index for index, word in enumerate(words) if not word.startswith("-")), len(words))
    try:
        options = _parser().parse(words[:own])
        if own == len(words):
            _parser().print_help()
        else:
            _call(words[own], words[own + 1 :], traceback=options.traceback or _asked_by_environment())
        sys.stdout.flush()
    except WrongUsageError as wrong:
        return _fail(f"error: {_one_line(wrong)}", 2)
    except _MendableError as error:
        return _fail(f"error: {_one_line(error)}", 1)
    except KeyboardInterrupt as interrupt:
        return _fail(f"interrupted: {interrupt}" if str(interrupt) else "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read has gone (`| head`). What is still to be flushed when Python ends goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as done:
        # argparse has printed help or version.
        return done.code if isinstance(done.code, int) else 0
    return 0


def _parser() -> Parser:
    commands = "\n".join(f"  {name:10} {command.summary}" for name, command in COMMANDS.items())
    parser = Parser(
        "loraplex",
        "Train, compare and deploy the whole LoRA family on Hugging Face models.",
        "loraplex [options] COMMAND ...",
        f"commands ('loraplex COMMAND --help' explains one):\n{commands}",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="Show where an error came from; so does LORAPLEX_DEBUG=1."
    )
    return parser


def _asked_by_environment() -> bool:
    return os.environ.get("LORAPLEX_DEBUG", "").lower() not in ("", "0", "false", "no", "off")


class _MendableError(Exception):
    """An error that the user can mend: one line, without a traceback."""


def _call(name: str, words: Sequence[str], traceback: bool) -> None:
    """Run one command.

    Raises:
        WrongUsageError: for a command or an option that is not there.
        _MendableError: in the place of a UserError, unless a traceback is asked for.
    """
    if name not in COMMANDS:
        known = nearest(name, COMMANDS) or f" The commands are: {', '.join(COMMANDS)}."
        raise WrongUsageError(f"there is no command '{name}'.{known} ('loraplex --help' shows what there is)")
    # Read by GNU OpenMP when torch is imported. Threads that wait by spinning for long take the cores from whoever has
    # work: beside another busy process a training step took five times as long.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    arguments = module.parser(f"loraplex {name}").parse(words)
    try:
        require(f"loraplex {name}", *command.extras)
        with _plain_reports(debug=traceback):
            module.run(arguments)
    except (UserError, OSError) as error:
        is_ours = isinstance(error, UserError) or error.errno in _USERS_OWN_OSERRORS
        if traceback or not is_ours:
            raise
        raise _MendableError(str(error)) from error


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
    print(f"warning: {_one_line(message)}", file=sys.stderr)


def _fail(line: str, status: int) -> int:
    print(line, file=sys.stderr)
    return status


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
