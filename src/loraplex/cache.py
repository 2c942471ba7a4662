"""Where loraplex keeps what it has made once and can make again."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Return the cache folder: the environment variable LORAPLEX_CACHE, else the user's own cache. It may not exist."""
    chosen = os.environ.get("LORAPLEX_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("loraplex")
