"""The run folder: what is in it, who may write to it, and which of its checkpoints are whole."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraplex.errors import UserError
from loraplex.files import hidden, leftovers, recover, remove, sync, write_atomically, write_json
from loraplex.run_paths import RunPaths
from loraplex.training.reading import read_recipe, recipe_to_dict, recipe_to_yaml
from loraplex.training.recipe import Recipe

# Written into a checkpoint when everything else is on disk: {file: size in bytes}.
MANIFEST = "loraplex_files.json"
logger = logging.getLogger(__name__)

_HEADER = "# The recipe of this run with every default spelled out: loraplex train THIS_FILE --output OTHER\n"
# Keys that do not change what is trained, so that a resumed run may have other values.
NOT_TRAINED_ON = ("evaluation", "output", "training.save_every", "training.keep_checkpoints", "training.logging_every")


class RunFolder(RunPaths):
    """The folder of one run: who may write to it, and which of its checkpoints are whole."""

    def check(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
        """Refuse, before anything slow happens and without touching a file, what would lose or mix results.

        Raises:
            UserError: when the folder is not empty and neither `resume` nor `overwrite` fits what is in it.
        """
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other: go on with the run, or train it anew")
        for path in (self.path, *self.path.parents):
            if path.exists() and not path.is_dir():
                raise UserError(f"output '{self.path}' cannot be a folder, '{path}' is a file: choose another --output")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not self.recipe.is_file():
            raise UserError(f"output '{self.path}' is not empty and not a run of loraplex: choose another --output")
        if not resume and not overwrite:
            raise UserError(
                f"output '{self.path}' is not empty: --resume goes on with that run, --overwrite replaces it, "
                "another --output keeps it"
            )
        if resume:
            self._check_same(recipe)

    def _check_same(self, recipe: Recipe) -> None:
        if self.metrics.is_file():
            raise UserError(f"the run in '{self.path}' is finished: --overwrite trains it again")
        before, now = leaves(recipe_to_dict(read_recipe(self.recipe))), leaves(recipe_to_dict(recipe))
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key) and not key.startswith(NOT_TRAINED_ON):
                raise UserError(
                    f"cannot resume '{self.path}': {key} was {before.get(key)!r} and is {now.get(key)!r} now; "
                    "set it back, or choose another --output"
                )

    @contextlib.contextmanager
    def opened(self, recipe: Recipe, *, resume: bool) -> Iterator[None]:
        """Make the folder ready for `recipe`, within the context; an earlier run that is not resumed lies aside in it.

        The earlier run is deleted when the context ends well. When it fails before a whole checkpoint or an adapter
        was written, the earlier run is put back; when it fails later it stays aside, and a line says where.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            if not resume:
                self._set_aside()
            write_atomically(self.recipe, _HEADER + recipe_to_yaml(recipe))
            yield
        except BaseException:
            self.recover()
            raise
        for earlier in leftovers(self.earlier, "old"):
            remove(earlier)

    def recover(self) -> None:
        """Put the folder in order after a run that failed or was killed, and say in a warning what was found."""
        for path in self.contents:
            recover(path)
        for earlier in reversed(leftovers(self.earlier, "old")):
            if self.metrics.is_file():
                remove(earlier)
            elif (earlier / self.recipe.name).exists() and (self.adapter.is_dir() or self.last_checkpoint()):
                logger.warning("the earlier run is kept in '%s' until the run in '%s' has finished", earlier, self.path)
            else:
                self._put_back(earlier)
                logger.warning("the earlier run is back in '%s': what was to replace it wrote no checkpoint", self.path)

    def _set_aside(self) -> None:
        found = [path for path in self.contents if path.exists()]
        if not found:
            return
        aside = hidden(self.earlier, "old")
        aside.mkdir()
        for path in found:
            path.rename(aside / path.name)

    def _put_back(self, aside: Path) -> None:
        """Undo `_set_aside`, whether or not it or this had come to its end when the process was killed."""
        if (aside / self.recipe.name).exists():
            for path in self.contents:
                remove(path)
        for path in reversed(self.contents):
            if (aside / path.name).exists() and not path.exists():
                (aside / path.name).rename(path)
        # Nothing is left in it, or something that is not ours.
        with contextlib.suppress(OSError):
            aside.rmdir()

    def last_checkpoint(self, before_step: int | None = None) -> Path | None:
        """Return the newest checkpoint that is whole, optionally only of steps < `before_step`."""
        found = {}
        for folder in self.checkpoints.glob("checkpoint-*"):
            step = folder.name.rpartition("-")[2]
            if step.isdecimal() and is_whole(folder) and (before_step is None or int(step) < before_step):
                found[int(step)] = folder
        return found[max(found)] if found else None


def seal(checkpoint: Path) -> None:
    """Record the sizes of all files of a finished checkpoint; what crashes before this is never resumed from."""
    sync(checkpoint)
    sizes = {str(file.relative_to(checkpoint)): file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()}
    write_json(checkpoint / MANIFEST, sizes)


def is_whole(checkpoint: Path) -> bool:
    """Tell whether all files of a checkpoint are there in the sizes they were sealed with."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Return {dotted path: value} of a nested mapping."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {
        leaf: value
        for key, branch in tree.items()
        for leaf, value in leaves(branch, f"{path}.{key}" if path else str(key)).items()
    }
