"""The peak memory of a stretch of work: the process's resident set on a CPU, torch's allocator on CUDA."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch


def start_peak() -> int:
    """Forget earlier peaks where the platform allows it and return the bytes in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):
        # Linux: 5 sets the high-water mark of the resident set to its present size.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS") or peak()


def peak() -> int:
    """Return the largest number of bytes in use since `start_peak` (elsewhere than on Linux: since the start)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    """Return a size from /proc/self/status in bytes, 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), 0)
