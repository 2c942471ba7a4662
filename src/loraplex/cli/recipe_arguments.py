"""What `train` and `plan` share: RECIPE and `--key value` on the command line, and the keys on the help page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from loraplex.training.documentation import Key


class RecipeCommand(click.Command):
    """A command that takes a recipe and any of its keys as options; its help lists the keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = {"ignore_unknown_options": True, **kwargs.get("context_settings", {})}
        kwargs.setdefault("options_metavar", "[OPTIONS]")
        super().__init__(*args, **kwargs)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the keys of a recipe, section by section, with their defaults."""
        from loraplex.training.documentation import recipe_keys

        keys = recipe_keys()
        for section in dict.fromkeys(key.section for key in sorted(keys, key=lambda key: key.section != "")):
            title = f"Keys of '{section}'" if section else "Keys of a recipe"
            write_keys(formatter, title, [key for key in keys if key.section == section])


def write_keys(formatter: click.HelpFormatter, title: str, keys: Sequence[Key]) -> None:
    """Write a group of keys with their doc lines and defaults."""
    with formatter.section(title):
        formatter.write_dl([_line(key) for key in keys])


def split_arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the recipe's path and the overrides; every `--key` takes the argument after it, or has `=VALUE`.

    Raises:
        click.UsageError: unless there is exactly one recipe.
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
        raise click.UsageError(f"give one recipe, {found}", click.get_current_context(silent=True))
    return paths[0], overrides


def _line(key: Key) -> tuple[str, str]:
    default = {"": " [required]", "None": ""}.get(key.default, f" [{key.default}]")
    return f"--{key.path}", f"{key.doc}{default}"
