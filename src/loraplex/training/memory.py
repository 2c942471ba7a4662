"""The peak memory of a stretch of work: the process's resident set on a CPU, torch's allocator on CUDA."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import psutil
import torch


def start_peak() -> int:
    """Forget earlier peaks where the platform allows it and return the bytes in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):
        # Linux: 5 sets the high-water mark of the resident set to its present size.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """Return the largest number of bytes in use since `start_peak` (elsewhere than on Linux: since the start)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    return _high_water_mark() or _largest_resident_set()


def _high_water_mark() -> int:
    """Return VmHWM of /proc/self/status in bytes, 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _largest_resident_set() -> int:
    # Windows has no such module.
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
