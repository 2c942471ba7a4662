"""The one exception that users are meant to read, and the search for the name they probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend. The message is one line: the thing, its value, the remedy.

    The command line prints it without a traceback and exits with status 1; in a program it is a `ValueError`.
    """


def nearest(name: str, candidates: Iterable[str], count: int = 1) -> str:
    """Return " Did you mean 'x'?" for the `count` closest of `candidates`, or "" when none is close."""
    close = difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.5)
    if not close:
        return ""
    return " Did you mean " + " or ".join(f"'{match}'" for match in close) + "?"
