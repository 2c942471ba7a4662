"""The run folder: what is in it, who may write to it, and which of its checkpoints are whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraplex.errors import UserError
from loraplex.training.reading import read_recipe, recipe_to_dict, recipe_to_yaml
from loraplex.training.recipe import Recipe

# Written into a checkpoint when everything else is on disk: {file: size in bytes}.
MANIFEST = "loraplex_files.json"
# Keys that do not change what is trained, so that a resumed run may have other values.
NOT_TRAINED_ON = ("evaluation", "output", "training.save_every", "training.keep_checkpoints", "training.logging_every")


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.evaluation = self.path / "evaluation"
        self.recipe = self.path / "recipe.yaml"
        self.decided = self.path / "decided.json"
        self.plan = self.path / "plan.json"
        self.metrics = self.path / "metrics.json"
        self.environment = self.path / "environment.json"
        self.plot = self.path / "loss.png"
        self.ranks_plot = self.path / "ranks.png"
        self.routing = self.path / "routing.json"
        self.routing_plot = self.path / "routing.png"

    @property
    def contents(self) -> tuple[Path, ...]:
        """Everything a run writes; nothing else in the folder is ever deleted."""
        return (
            self.adapter,
            self.checkpoints,
            self.evaluation,
            self.recipe,
            self.decided,
            self.plan,
            self.metrics,
            self.environment,
            self.plot,
            self.ranks_plot,
            self.routing,
            self.routing_plot,
        )

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

    def open(self, recipe: Recipe, *, resume: bool) -> None:
        """Make the folder ready for `recipe`: emptied of an earlier run unless that is resumed."""
        if not resume:
            for path in self.contents:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        header = "# The recipe of this run with every default spelled out: loraplex train THIS_FILE --output OTHER\n"
        write_atomically(self.recipe, header + recipe_to_yaml(recipe))

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
    sizes = {str(file.relative_to(checkpoint)): file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()}
    write_atomically(checkpoint / MANIFEST, json.dumps(sizes, indent=1))


def is_whole(checkpoint: Path) -> bool:
    """Tell whether all files of a checkpoint are there in the sizes they were sealed with."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that readers see the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fill_atomically(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary folder beside `folder` and put that in its place when all went well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fill(temporary)
        # mkdtemp and safetensors write for their owner alone; give everything the rights it would get otherwise.
        mask = _umask()
        temporary.chmod(0o777 & ~mask)
        for file in temporary.iterdir():
            if file.is_file():
                file.chmod(0o666 & ~mask)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Return {dotted path: value} of a nested mapping."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {
        leaf: value
        for key, branch in tree.items()
        for leaf, value in leaves(branch, f"{path}.{key}" if path else str(key)).items()
    }
