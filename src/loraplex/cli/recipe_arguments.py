"""RECIPE and `--key value` on the command line of `train`, `plan` and `compare`, and the keys on their help pages."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from loraplex.cli.arguments import Parser, WrongUsageError, default_in_help
from loraplex.cli.keys import COMPARISON, known_keys


class RecipeParser(Parser):
    """A parser that leaves RECIPE and the keys to whoever reads recipes; its help lists the keys."""

    def __init__(self, prog: str, description: str, *, compares: bool = False) -> None:
        usage = f"{prog} RECIPE [--KEY VALUE]... [options]"
        epilog = "All other keys are those of a training recipe: see 'loraplex train --help'." if compares else None
        super().__init__(prog, description, usage, epilog)
        self.compares = compares

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Return the options of the command, and as `recipe` and `overrides` what is left.

        Raises:
            WrongUsageError: unless there is exactly one recipe.
        """
        arguments, rest = self.parse_known_args(argv)
        try:
            arguments.recipe, arguments.overrides = split_arguments(rest)
        except WrongUsageError as wrong:
            self.error(str(wrong))
        return arguments

    def format_help(self) -> str:
        """Return the help page, on which keys look like options."""
        for title, keys in known_keys().items():
            if (title in COMPARISON) is self.compares:
                group = self.add_argument_group(title)
                for key in keys:
                    said = key.doc + (" [required]" if key.required else default_in_help(key.default))
                    group.add_argument(f"--{key.path}", metavar="", help=said.replace("%", "%%"))
        return super().format_help()


def split_arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the recipe's path and the overrides; every `--key` takes the argument after it, or has `=VALUE`.

    Raises:
        WrongUsageError: unless there is exactly one recipe.
    """
    paths, overrides, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            paths.append(argument)
            continue
        overrides.append(argument)
        # A missing value is reported with the key by whoever reads the overrides.
        if "=" not in argument and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    if len(paths) != 1:
        found = "none is given" if not paths else f"these are {len(paths)}: {' '.join(paths)}"
        raise WrongUsageError(f"give one recipe, {found}")
    return paths[0], overrides
