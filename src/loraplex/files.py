"""Writing files and folders: whole or not at all, and what stood there before stays until the new is in its place.

What is not finished yet lies beside its place under a hidden name, ".NAME.loraplex-new-…", and what is about to be
replaced under ".NAME.loraplex-old-…". The end of such a name says which process made it, so that `recover` can tell
what a killed process has left behind from what another process is working on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import psutil

logger = logging.getLogger(__name__)

# Of a process on another machine nobody here can tell whether it still runs; nothing takes that long to write.
_ABANDONED_SECONDS = 86_400
# Between the clock of the processes and that of the files.
_CLOCK_ERROR = 2.0


def write_atomically(path: Path, content: str | bytes | Callable[[Path], object], *, durable: bool = True) -> None:
    """Write a file so that readers see the old content or the new one, never a part, also when processes race.

    A callable is given the path of an empty file, which it fills or replaces. Folders on the way are made. A `durable`
    file is on the disk when this returns; leave that out only for what can be made again.

    Raises:
        OSError: when it cannot be written; nothing is left behind, and what stood at `path` still does.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in leftovers(path, "new"):
        remove(left)
    temporary = hidden(path, "new")
    try:
        # Opened like this, and not by `tempfile`, a file has the rights that the user's files have.
        with temporary.open("xb") as file:
            rights = os.fstat(file.fileno()).st_mode & 0o777
            if isinstance(content, str | bytes):
                file.write(content.encode() if isinstance(content, str) else content)
        if callable(content):
            content(temporary)
            temporary.chmod(rights)
        if durable:
            _sync_file(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        _sync_entries(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fill_atomically(folder: Path, fill: Callable[[Path], None], *, replace: bool = True) -> None:
    """Let `fill` write into an empty folder beside `folder`, and put that in its place when all went well.

    What stood at `folder` is moved aside for the moment of the exchange and deleted after it. Without `replace`, what
    another process has put there in the meantime stays: it is as good.

    Raises:
        OSError: when the folder cannot be written or put in place.
        BaseException: whatever `fill` raises. In both cases what stood at `folder` still does, and nothing else is
            left behind.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    temporary = hidden(folder, "new")
    try:
        temporary.mkdir()
        fill(temporary)
        _give_usual_rights(temporary)
        sync(temporary)
        if replace:
            _exchange(temporary, folder)
        else:
            _publish(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def recover(path: Path) -> None:
    """Clean up after processes that were killed while they wrote `path`, and log a warning where that matters.

    An earlier content that lies aside while nothing stands at `path` is put back; everything else that was left is
    deleted. What a running process works on is left alone.
    """
    for left in leftovers(path, "old"):
        if path.exists():
            remove(left)
        else:
            left.rename(path)
            logger.warning("'%s' had been moved aside by a process that was killed; it is back", path)
    for left in leftovers(path, "new"):
        remove(left)


def hidden(path: Path, what: Literal["new", "old"]) -> Path:
    """Return a free hidden name beside `path`, with the name of this machine and the number of this process in it."""
    return path.with_name(f"{_prefix(path, what)}{_machine()}-{os.getpid()}-{secrets.token_hex(4)}")


def leftovers(path: Path, what: Literal["new", "old"]) -> list[Path]:
    """Return what lies hidden beside `path` and belongs to no other process that still runs, the oldest first."""
    prefix = _prefix(path, what)
    if not path.parent.is_dir():
        return []
    found = [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]
    return sorted((entry for entry in found if not _is_in_use(entry, what)), key=_made)


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Wait until everything in `folder` is on the disk."""
    for entry in (*folder.rglob("*"), folder):
        if entry.is_dir():
            _sync_entries(entry)
        elif entry.is_file():
            _sync_file(entry)


def _exchange(temporary: Path, folder: Path) -> None:
    """Put `temporary` in the place of `folder`, whether something stands there or not."""
    aside = hidden(folder, "old") if folder.exists() else None
    if aside is not None:
        folder.rename(aside)
    try:
        temporary.rename(folder)
    except BaseException:
        if aside is not None:
            aside.rename(folder)
        raise
    _sync_entries(folder.parent)
    if aside is not None:
        try:
            remove(aside)
        except OSError as error:
            logger.warning("'%s' is in place, but what it replaced is still in '%s': %s", folder, aside, error)


def _publish(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        remove(temporary)


def _give_usual_rights(folder: Path) -> None:
    """Give the files in `folder` the rights that the user's own have: safetensors writes for the owner alone."""
    probe = folder / ".rights"
    probe.touch()
    for_files = probe.stat().st_mode & 0o777
    probe.unlink()
    for entry in folder.rglob("*"):
        if entry.is_file() and not entry.is_symlink():
            entry.chmod(for_files)


def _sync_file(path: Path) -> None:
    # Windows wants a file that is open for writing.
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_entries(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk, on systems that let one wait for that."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _prefix(path: Path, what: str) -> str:
    return f".{path.name}.loraplex-{what}-"


def _machine() -> str:
    return re.sub(r"[^\w]", "_", platform.node())[:40] or "unknown"


def _made(entry: Path) -> float:
    """Return when a hidden name was given, in seconds since 1970: a renamed folder keeps its time of change."""
    found = entry.lstat()
    return max(found.st_mtime, found.st_ctime)


def _is_in_use(entry: Path, what: str) -> bool:
    """Tell whether the process that gave a hidden name may still be running. What this one moved aside, it knows of."""
    machine, number, _ = entry.name.rpartition(f".loraplex-{what}-")[2].split("-")
    if machine != _machine():
        return time.time() - _made(entry) < _ABANDONED_SECONDS
    if what == "old" and int(number) == os.getpid():
        return False
    try:
        # A process that began later has got the number of the one that is gone.
        return bool(psutil.Process(int(number)).create_time() - _CLOCK_ERROR <= _made(entry))
    except psutil.Error:
        return False
