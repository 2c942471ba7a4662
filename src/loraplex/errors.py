"""The one exception that users are meant to read, the search for the name they meant, and errors of their machine."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

# As the allocators of torch and the system say it.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


class UserError(ValueError):
    """A mistake the user can mend. The message is one line: the thing, its value, the remedy.

    The command line prints it without a traceback and exits with status 1; in a program it is a `ValueError`.
    """


_RENAMED = {
    "alpha": "lora_alpha",
    "init_weights": "init_lora_weights",
    "first": "warmup_epochs",
    "then": "interval_epochs",
    "by": "group_by",
    "pruned": "ranks_per_round",
    "of": "score_target",
    "every": "interval",
    "rankings": "separate_rankings",
    "items_at_once": "batch_size",
}
"""Names that options had before 0.1, and what they are called now: a recipe of then is told what to change."""


def nearest(name: str, candidates: Iterable[str], count: int = 1) -> str:
    """Return " Did you mean 'x'?" for the `count` closest of `candidates`, or "" when none is close.

    An option that had another name before 0.1 is told its name now.
    """
    known = list(candidates)
    new = _RENAMED.get(name.rpartition(".")[2])
    for candidate in known:
        if new is not None and candidate.rpartition(".")[2] == new:
            return f" It is called '{candidate}' now."
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if not close:
        return ""
    return " Did you mean " + " or ".join(f"'{match}'" for match in close) + "?"


def remedy_here(error: BaseException) -> str | None:
    """Return what to do about an error that this machine is to blame for: its memory, its disk, or a right on it.

    None for every other error. Code that catches a wide class of errors to blame what was asked for looks here first:
    torch, for one, raises a `RuntimeError` for a tensor that finds no room.
    """
    if is_out_of_memory(error):
        return "there is not enough memory: end what else runs here, or take something smaller"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: free some space, or set HF_HOME or LORAPLEX_CACHE to another disk"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "the right to read or write is missing: give it to this user"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many files are open: raise the limit with 'ulimit -n'"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory of the machine or of an accelerator ran out; torch says so by class, or only in words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in _OUT_OF_MEMORY)
