"""What the result of a job depends on: recipe, data, base model, files that options name, packages, our own code.

All of it goes into one digest, which is part of the name of the job's folder: a job whose data or code has changed
never meets old results. The parts are kept beside the results, so that a later comparison can say what has changed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import loraplex
from loraplex.data.builtin import BUILTIN
from loraplex.data.options import DataOptions, Split
from loraplex.data.sources import local_files
from loraplex.models.loading import resolve_model
from loraplex.training.folder import leaves, write_json
from loraplex.training.reading import recipe_to_dict
from loraplex.training.recipe import Recipe

# Their numbers are ours: another version may compute other ones.
COMPUTING = ("torch", "transformers", "peft", "trl", "accelerate")
# Parts of loraplex that only show or convert what a job has left; of comparison/, the worker alone does a job's work.
SHOWING = ("cli", "comparison", "export")
WORKER = Path("comparison/worker.py")
# A file up to this size is read whole; of a larger one, which holds weights, as many blocks at even distances.
WHOLE = 16 << 20
BLOCK, BLOCKS = 1 << 16, 64


@dataclass(frozen=True)
class Identity:
    """Everything that decides a job's result, as plain values."""

    kind: str
    recipe: Mapping[str, Any]
    """The training recipe as a mapping, without its output folder."""
    data: Mapping[str, str]
    """By source, as the recipe names it, a hash of the content of its files, or its revision on the hub."""
    model: Mapping[str, str]
    """By name, a hash of the base model's folder, or its revision on the hub."""
    files: Mapping[str, str]
    """By path, a hash of the content of every file that an option names."""
    packages: Mapping[str, str]
    """Versions of the packages that compute the result or make the data."""
    code: str
    """A hash of the installed source of loraplex, without the parts that only show or convert results."""

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits of a hash of all parts."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]

    def write(self, path: Path) -> None:
        """Write the parts as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Identity | None:
        """Return the parts that were written to `path`, None where there are none that can be read."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def changes_since(self, earlier: Identity) -> list[str]:
        """Return what is different from an earlier job of the same name, in a few words each, the nearest cause first.

        Data that only one of the two has follow from a change of the recipe, which is named instead.
        """
        found = [
            f"{key} was {before!r} and is {now!r} now"
            for key, before, now in _differences(leaves(earlier.recipe), leaves(self.recipe))
        ]
        found += [f"the data of {name} have changed" for name, *_ in _common(earlier.data, self.data)]
        found += [f"the file {name} has changed" for name, *_ in _differences(earlier.files, self.files)]
        found += [f"the base model {name} has changed" for name, *_ in _common(earlier.model, self.model)]
        if self.code != earlier.code:
            found.append("loraplex's own code has changed since")
        packages = _common(earlier.packages, self.packages)
        found += [f"{name} was {before} and is {now} now" for name, before, now in packages]
        return found or ["what it is made from has changed"]


@dataclass(frozen=True)
class Identifier:
    """Finds the identities of jobs; what is slow to find is found once for all jobs of a comparison."""

    _hub: dict[tuple[str, str | None, str], str] = field(default_factory=dict)

    def identity(self, kind: str, recipe: Recipe) -> Identity:
        """Return the identity of a job that does `kind` with `recipe`.

        Raises:
            UserError: when the base model or a benchmark set is not there.
        """
        plain = recipe_to_dict(recipe)
        data: dict[str, str] = {}
        packages = {name: _version(name) for name in COMPUTING}
        for split in _splits(recipe):
            for source in recipe.data.sources(split):
                if source.startswith(BUILTIN):
                    packages["reasoning-gym"] = _version("reasoning-gym")
                elif files := local_files(source):
                    data[source] = _hash_of_files(files)
                else:
                    data[f"{source} ({split})"] = self._revision(source, recipe.data, split)
        named = {key: plain[key] for key in ("adapter", "peft", "training")}
        return Identity(
            kind=kind,
            recipe={key: value for key, value in plain.items() if key != "output"},
            data=data,
            model={recipe.model.name: _hash_of_model(recipe.model.name)},
            files={path: _hash_of_file(Path(path)) for path in sorted(set(_named_files(named)))},
            packages=packages,
            code=_hash_of_files(deciding_source()),
        )

    def _revision(self, source: str, options: DataOptions, split: Split) -> str:
        """Return the revision of a hub data set: `datasets` keeps its rows under the name of the commit."""
        from datasets import load_dataset

        rows_of = options.train_split if split == "train" else options.test_split
        key = (source, options.config, rows_of)
        if key not in self._hub:
            dataset = load_dataset(source, name=options.config, split=rows_of)
            kept = ["/".join(Path(file["filename"]).parts[-3:]) for file in dataset.cache_files]
            self._hub[key] = " ".join(sorted(kept)) or "unknown"
        return self._hub[key]


def deciding_source() -> list[Path]:
    """Return the source files of loraplex that decide what a job computes, sorted."""
    root = Path(loraplex.__file__).parent
    return sorted(
        path
        for path in root.rglob("*.py")
        if (inside := path.relative_to(root)).parts[0] not in SHOWING or inside == WORKER
    )


def _splits(recipe: Recipe) -> list[Split]:
    """Return the splits that a job of this recipe reads."""
    tested = recipe.data.has_test and recipe.evaluation.rows == "test" and recipe.evaluation.kind != "none"
    return ["train", "test"] if tested else ["train"]


def _hash_of_model(name: str) -> str:
    """Return a hash of a model folder, or the commit of a model from the hub."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(resolve_model(name))
    if folder.is_dir():
        files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
        return _hash_of_files(sorted(path for path in files if path.suffix != ".md"))
    config = try_to_load_from_cache(name, "config.json")
    # .../snapshots/COMMIT/config.json
    return Path(config).parent.name if isinstance(config, str) else "unknown"


def _hash_of_files(files: list[Path]) -> str:
    """Return a hash of the contents of files and of their names within the folder that holds them all."""
    root = os.path.commonpath([path.parent for path in files])
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root).as_posix()} {_hash_of_file(path)}\n".encode())
    return digest.hexdigest()


def _hash_of_file(path: Path) -> str:
    stat = path.stat()
    return _hash_of_content(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _hash_of_content(path: Path, size: int, modified: int) -> str:
    """Return a hash of a file's content; size and time of change make it anew for another content in this process."""
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for block in range(BLOCKS):
            file.seek((size - BLOCK) * block // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
        return digest.hexdigest()


def _named_files(value: Any) -> Iterator[str]:
    """Yield every text in nested options that is the path of a file."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _named_files(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _named_files(inner)
    # a bare word such as "lora" is a name, even where a file is called so
    elif isinstance(value, str) and ("." in value or "/" in value) and len(value) < 4096 and Path(value).is_file():
        yield value


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return key, earlier and present value of everything that differs."""
    keys = sorted({*before, *now})
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]


def _common(before: Mapping[str, str], now: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return key, earlier and present value of what both have and what differs."""
    return [(key, before[key], value) for key, value in now.items() if key in before and before[key] != value]
