"""The jobs of a comparison: what each process of a sweep does, where its results lie, and when they are there."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from loraplex import __version__
from loraplex.files import write_atomically
from loraplex.training.folder import RunFolder
from loraplex.training.reading import recipe_to_yaml
from loraplex.training.recipe import Recipe


class Kind(StrEnum):
    """What a job does with its recipe."""

    BASE = "base"
    """Measure the base model, without any adapter."""
    TRAIN = "train"
    """Train, save and measure: `loraplex train`."""
    FLOPS = "flops"
    """Count the operations of training per token."""


@dataclass(frozen=True)
class Job:
    """One process. The folder's name carries a hash of the recipe, so a changed recipe never meets old results."""

    kind: Kind
    name: str
    """Unique within the comparison and readable: "lora-s0", "lora-lr0.001"."""
    recipe: Recipe
    """As it is trained: its `output` is the job's folder."""
    file: Path
    """The recipe as a file, for whoever repeats the run."""

    @property
    def folder(self) -> Path:
        """Where the results are."""
        return Path(self.recipe.output)

    @property
    def result(self) -> Path:
        """Written last: the job is finished when it is there."""
        return RunFolder(self.folder).metrics

    @property
    def finished(self) -> bool:
        """Whether the results are there and whole."""
        return self.result.is_file()

    @property
    def steps(self) -> int:
        """Optimizer steps to show progress by; a job that does not train counts as one."""
        return (self.recipe.training.max_steps or 1) if self.kind is Kind.TRAIN else 1

    def metrics(self) -> dict[str, Any]:
        """Return what the finished job measured."""
        found: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        return found

    def write_recipe(self) -> None:
        """Write the recipe for `loraplex train`, without the output folder: who repeats the run names another."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        head = f"# One run of a comparison: loraplex train {self.file} --output FOLDER\n"
        write_atomically(self.file, head + recipe_to_yaml(replace(self.recipe, output=f"runs/{self.name}")))


def make_job(kind: Kind, name: str, recipe: Recipe, output: Path) -> Job:
    """Return the job of a recipe within the comparison folder `output`."""
    recipe = replace(recipe, output="")
    identity = f"{__version__}\n{kind}\n{recipe_to_yaml(recipe)}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    folder = output / "runs" / f"{name}-{digest}"
    return Job(kind, name, replace(recipe, output=str(folder)), output / "recipes" / f"{name}.yaml")
