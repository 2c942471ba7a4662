"""A contestant's side of a benchmark: one round of work for every line on stdin, one line of JSON for its result.

A result is sent when the process is idle again, with everything after the timed part behind it, so that the next
contestant has the machine to itself. The end of stdin is the end of the benchmark.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import count
from typing import Any


class Finished(Exception):  # noqa: N818
    """Nobody wants another round."""


class Turns:
    """Waits for rounds and reports them."""

    def __init__(self) -> None:
        # The wire is the process's stdout; what libraries print goes to stderr instead.
        self._wire = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._pending: dict[str, Any] | None = None

    def loaded(self) -> None:
        """Note the size of the process now that its model is loaded; peaks count from here."""
        from loraplex.training.memory import start_peak

        self._pending = {"loaded_bytes": start_peak()}

    def wait(self) -> None:
        """Send what there is to send and wait for the next round.

        Raises:
            Finished: there is none.
        """
        assert self._pending is not None
        self._wire.write(json.dumps(self._pending) + "\n")
        self._wire.flush()
        self._pending = None
        if not sys.stdin.readline():
            raise Finished

    def report(self, seconds: float, amount: int, **extra: Any) -> None:
        """Keep the result of a round, `amount` being its real tokens or items, for the next `wait`."""
        from loraplex.training.memory import peak

        self._pending = {"seconds": seconds, "amount": amount, "peak_bytes": peak(), **extra}

    def serve(self, work: Callable[[int], tuple[int, dict[str, Any]]], tidy: Callable[[], None] = lambda: None) -> None:
        """Time `work(round)`, which returns its amount and what else to report; `tidy` runs after it, untimed."""
        try:
            for index in count():
                self.wait()
                start = time.perf_counter()
                amount, extra = work(index)
                seconds = time.perf_counter() - start
                tidy()
                self.report(seconds, amount, **extra)
        except Finished:
            return
