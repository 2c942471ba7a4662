"""Starts the processes of jobs: forks of one that has imported everything, or fresh ones where that cannot be."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Self

from loraplex.comparison.fork_server import ForkedProcess, ForkServer, NoForkServerError

logger = logging.getLogger(__name__)

WORKER = "loraplex.comparison.worker"
# What a job imports sooner or later, the methods and the pictures included.
MODULES = (
    WORKER,
    "loraplex.training.report",
    "loraplex.training.routing_report",
    "loraplex.training.saving",
    "loraplex.training.counts",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)


class Workers:
    """The processes of a comparison's jobs. Closed, it starts no more of them; those that run are not touched."""

    def __init__(self, threads: int | None = None, server: ForkServer | None = None) -> None:
        """Give every process so many threads unless the user's environment says how many; None leaves it to torch.

        A `server` that has imported `MODULES` already may be lent; it decides the number of threads, and is not closed.
        """
        self._environment = dict(os.environ)
        if threads is not None:
            self._environment.setdefault("OMP_NUM_THREADS", str(threads))
        self._server = server
        self._is_lent = server is not None
        self._can_fork = True

    def prepare(self) -> None:
        """Start the server, if there is none, and return when its imports are done.

        A single job is forked too: a fork has fewer pages of its code in memory when it starts to train than a fresh
        process, about 12 MB, and all jobs of a comparison are measured alike.
        """
        if self._server is not None or not self._can_fork:
            return
        try:
            self._server = ForkServer(MODULES, self._environment)
            self._server.wait_until_ready()
        except NoForkServerError as reason:
            self._give_up(reason)

    def start(self, arguments: Sequence[str], log: IO[str]) -> Running:
        """Start a process of `loraplex.comparison.worker` with these arguments; its standard error is `log`."""
        if self._server is not None:
            try:
                return _forked(self._server, arguments, log)
            except NoForkServerError as reason:
                self._give_up(reason)
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=self._environment,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        return Running(process, process.stdin, process.stdout)

    def close(self) -> None:
        """End the server, unless it is lent."""
        if self._server is not None and not self._is_lent:
            self._server.close()
        self._server = None

    def __enter__(self) -> Self:
        """Return the workers."""
        return self

    def __exit__(self, *failure: object) -> None:
        """End the server, unless it is lent."""
        self.close()

    def _give_up(self, reason: NoForkServerError) -> None:
        self.close()
        self._can_fork = False
        # elsewhere it is no news
        level = logging.INFO if sys.platform.startswith("linux") else logging.DEBUG
        logger.log(level, "every run imports torch and transformers anew: %s", reason)


@dataclass(frozen=True)
class Running:
    """A job that runs. It ends when `lifeline` is closed, and so with this process."""

    process: subprocess.Popen[str] | ForkedProcess
    lifeline: IO[str]
    """Its standard input, to which nothing is written."""
    output: IO[str]
    """Its standard output."""

    def __enter__(self) -> Self:
        """Return the job."""
        return self

    def __exit__(self, *failure: object) -> None:
        """Wait for its end, which comes at once where the job is left because of a failure here."""
        if failure[0] is not None:
            self.lifeline.close()
        self.process.wait()
        self.lifeline.close()
        self.output.close()


def _forked(server: ForkServer, arguments: Sequence[str], log: IO[str]) -> Running:
    theirs_in, lifeline = os.pipe()
    output, theirs_out = os.pipe()
    try:
        process = server.fork(f"{WORKER}:main", arguments, [theirs_in, theirs_out, log.fileno()])
    except NoForkServerError:
        os.close(lifeline)
        os.close(output)
        raise
    finally:
        os.close(theirs_in)
        os.close(theirs_out)
    return Running(process, os.fdopen(lifeline, "w", encoding="utf-8"), os.fdopen(output, encoding="utf-8"))
