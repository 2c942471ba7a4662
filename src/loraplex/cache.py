"""Where loraplex keeps what it has made once and can make again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder: LORAPLEX_CACHE, else `loraplex` where torch and the hub client keep theirs.

    That is XDG_CACHE_HOME, else ~/.cache, on every system. The folder may not exist.
    """
    if chosen := os.environ.get("LORAPLEX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loraplex"


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
