"""The one exception that users are meant to read, and the search for the name they probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
