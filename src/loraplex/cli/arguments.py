"""Arguments of commands on the standard library's argparse: one-line errors, and options made from keys of a recipe."""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from loraplex.cli.keys import known_key
from loraplex.documentation import Key
from loraplex.errors import UserError, nearest

# Beyond this, lines of help are hard to read.
_WIDEST = 100


class WrongUsageError(Exception):
    """A command line that makes no sense; ends with status 2."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are raised, and whose description keeps its paragraphs."""

    def __init__(self, prog: str, description: str, usage: str | None = None, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=_paragraphs(description),
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise the message, with the way to the help."""
        raise WrongUsageError(f"{message} ('{self.prog} --help' shows what there is)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Return the arguments, which may stand in any order.

        Raises:
            WrongUsageError: for anything that is not known; an option that is not has the nearest that is.
        """
        arguments, rest = self.parse_known_intermixed_args(argv)
        for word in rest:
            if word.startswith("-"):
                name = word.partition("=")[0]
                options = re.findall(r"--[\w-]+", self.format_help())
                self.error(f"there is no option '{name}'.{nearest(name, options)}")
        if rest:
            self.error(f"too many arguments: {' '.join(rest)}")
        return arguments


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(shutil.get_terminal_size().columns, _WIDEST) - 2)


def _paragraphs(text: str) -> str:
    width = min(shutil.get_terminal_size().columns, _WIDEST) - 2
    return "\n\n".join(textwrap.fill(" ".join(part.split()), width) for part in text.split("\n\n"))


def whole(least: int) -> Callable[[str], int]:
    """Return the type of an option that is a whole number of at least `least`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
        return value

    return read


def number(least: float, most: float = float("inf"), *, above: bool = False) -> Callable[[str], float]:
    """Return the type of an option that is a number from `least`, or just above it, to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (least < value <= most if above else least <= value <= most):
            bound = "" if most == float("inf") else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a number {'above' if above else 'of at least'} {least:g}{bound}"
            )
        return value

    return read


def default_in_help(value: object) -> str:
    """Return what a help text says of a default."""
    if value is None or value in ("", [], {}):
        return ""
    return f" [{str(value).lower() if isinstance(value, bool) else value}]"


def add_keys(
    parser: argparse.ArgumentParser, flags: Mapping[str, str], changed: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Give a parser options that are keys of a recipe: `flags` is {"--limit": "data.max_test"}.

    Type, choices, default and help are those of the key; what is different for this command stands in `changed`, by
    flag, in argparse's words. `section` collects what was given.
    """
    for flag, path in flags.items():
        key = known_key(path)
        settings = {**_settings(key, flag), **(changed or {}).get(flag, {})}
        said = settings.pop("help")
        if settings.get("action") != "store_true":
            said += default_in_help(settings["default"])
        parser.add_argument(flag, dest=path, help=said.replace("%", "%%"), **settings)


def _settings(key: Key, flag: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"default": key.default, "help": key.doc}
    if key.type == "boolean":
        return {**settings, "action": "store_true"}
    if key.choices:
        return {**settings, "choices": key.choices}
    metavar = flag.strip("-").replace("-", "_").upper()
    if "array" in key.type:
        several = f"{key.doc} May be given several times."
        return {**settings, "help": several, "action": "append", "metavar": metavar}
    types: dict[str, Any] = {"integer": int if key.least is None else whole(key.least), "number": float, "string": str}
    return {**settings, "type": types[key.type], "metavar": metavar}


def section(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the values of the keys of one section of a recipe, by their names in it."""
    prefix = f"{name}."
    found = {key.removeprefix(prefix): value for key, value in vars(arguments).items() if key.startswith(prefix)}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


@contextlib.contextmanager
def in_words_of(flags: Mapping[str, str]) -> Iterator[None]:
    """Let errors name the options of this command where they name keys of a recipe; `flags` as in `add_keys`."""
    words = {path: flag for flag, path in flags.items()}
    try:
        yield
    except UserError as error:
        said = re.sub(r"\b[a-z]+\.[a-z_]+\b", lambda found: words.get(found[0], found[0]), str(error))
        if said == str(error):
            raise
        raise UserError(said) from error
