"""Where loraplex keeps what it has made once and can make again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Return the cache folder: the environment variable LORAPLEX_CACHE, else the user's own cache. It may not exist."""
    chosen = os.environ.get("LORAPLEX_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("loraplex")


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Keep nothing that is made in this block: it belongs to weights that nobody will see again."""
    token = _KEEPING.set(False)
    try:
        yield
    finally:
        _KEEPING.reset(token)


def keeping() -> bool:
    """Whether what is made now is worth keeping."""
    return _KEEPING.get()


_KEEPING = ContextVar("keeping", default=True)
