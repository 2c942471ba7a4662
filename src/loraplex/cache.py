"""Where loraplex keeps what it has made once and can make again."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder: LORAPLEX_CACHE, else `loraplex` where torch and the hub client keep theirs.

    That is XDG_CACHE_HOME, else ~/.cache, on every system. The folder may not exist.
    """
    if chosen := os.environ.get("LORAPLEX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loraplex"


def write_whole(file: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `file` and put it in place: whole or not at all, also when processes race.

    Raises:
        OSError: when it cannot be written; nothing is left behind.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=f".part{file.suffix}")
    os.close(handle)
    try:
        write(Path(name))
        Path(name).replace(file)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def cache_disabled() -> Iterator[None]:
    """Keep nothing that is made in this block: it belongs to weights that nobody will see again."""
    token = _KEEPING.set(False)
    try:
        yield
    finally:
        _KEEPING.reset(token)


def cache_enabled() -> bool:
    """Whether what is made now is worth keeping."""
    return _KEEPING.get()


_KEEPING = ContextVar("keeping", default=True)
