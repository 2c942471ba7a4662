"""The jobs of a comparison: what each process of a sweep does, where its results lie, and when they are there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from loraplex.comparison.identity import Identifier, Identity
from loraplex.training.folder import RunFolder, write_atomically
from loraplex.training.reading import recipe_to_yaml
from loraplex.training.recipe import Recipe

IDENTITY = "identity.json"


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
    """One process. Its folder's name carries the digest of its identity: what has changed never meets old results."""

    kind: Kind
    name: str
    """Unique within the comparison and readable: "lora-s0", "lora-lr0.001"."""
    recipe: Recipe
    """As it is trained: its `output` is the job's folder."""
    file: Path
    """The recipe as a file, for whoever repeats the run."""
    identity: Identity

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

    def record(self) -> None:
        """Write down what the finished results depend on."""
        self.identity.write(self.folder / IDENTITY)

    def metrics(self) -> dict[str, Any]:
        """Return what the finished job measured."""
        found: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        return found

    def write_recipe(self) -> None:
        """Write the recipe for `loraplex train`, without the output folder: who repeats the run names another."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        head = f"# One run of a comparison: loraplex train {self.file} --output FOLDER\n"
        write_atomically(self.file, head + recipe_to_yaml(replace(self.recipe, output=f"runs/{self.name}")))


def make_job(kind: Kind, name: str, recipe: Recipe, output: Path, identifier: Identifier) -> Job:
    """Return the job of a recipe within the comparison folder `output`.

    Raises:
        UserError: when the base model or the data are not there.
    """
    identity = identifier.identity(kind, recipe)
    folder = output / "runs" / f"{name}-{identity.digest}"
    return Job(kind, name, replace(recipe, output=str(folder)), output / "recipes" / f"{name}.yaml", identity)


def why_again(job: Job) -> str | None:
    """Return why the finished results of an earlier job of this name are not those of `job`; None if there are none.

    Where there are several, it is the one from which the least has changed.
    """
    reasons: list[Sequence[str]] = []
    for folder in job.folder.parent.glob(f"{job.name}-{'[0-9a-f]' * 8}"):
        if RunFolder(folder).metrics.is_file():
            earlier = Identity.read(folder / IDENTITY)
            unknown = ["an earlier version of loraplex has not written down what it was made from"]
            reasons.append(unknown if earlier is None else job.identity.changes_since(earlier))
    if not reasons:
        return None
    first, *more = min(reasons, key=len)
    return f"{first}, and {len(more)} more" if len(more) > 1 else " and ".join([first, *more])
