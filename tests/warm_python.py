"""Python processes that cost a fork and not the seconds that torch, transformers and PEFT take to be imported.

What runs in one finds the modules of its server imported already, and is else as it would be in a fresh process: see
`loraplex.comparison.fork_server`. What a test proves about imports takes a fresh process.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from loraplex.comparison.fork_server import ForkedProcess, ForkServer


class Python:
    """A running process: the parts of `subprocess.Popen` that tests use."""

    def __init__(self, server: ForkServer, arguments: Sequence[str], cwd: Path | str, env: Mapping[str, str]) -> None:
        self.args = list(arguments)
        # they live as long as this object: what has been written is read whenever a test asks
        self._output, self._error = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        asked = json.dumps({"arguments": self.args, "cwd": str(cwd), "environment": dict(env)})
        with Path(os.devnull).open() as nothing:
            files = [file.fileno() for file in (nothing, self._output, self._error)]
            self.process: ForkedProcess = server.fork("tests.as_python:run", [asked], files)

    def poll(self) -> int | None:
        return self.process.poll()

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float | None = None) -> int:
        return self.process.wait(timeout)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return what it wrote to its output and its errors, when it has ended."""
        self.wait(timeout)
        return self.written(), _all_of(self._error)

    def written(self) -> str:
        """Return what it has written to its output so far."""
        return _all_of(self._output)

    @property
    def returncode(self) -> int | None:
        return self.process.returncode


class WarmPython:
    """A fork server for tests; it starts when it is first asked for something."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = modules
        self._server: ForkServer | None = None

    @property
    def server(self) -> ForkServer:
        if self._server is None:
            root = str(Path(__file__).parents[1])
            path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
            self._server = ForkServer([*self.modules, "tests.as_python"], {**os.environ, "PYTHONPATH": path})
        return self._server

    def start(self, *arguments: str, cwd: Path | str = ".", env: Mapping[str, str] | None = None) -> Python:
        """Start `python ARGUMENTS`."""
        return Python(self.server, arguments, cwd, os.environ if env is None else env)

    def run(
        self, *arguments: str, cwd: Path | str = ".", env: Mapping[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run `python ARGUMENTS` to its end."""
        process = self.start(*arguments, cwd=cwd, env=env)
        output, error = process.communicate(timeout)
        assert process.returncode is not None
        return subprocess.CompletedProcess(process.args, process.returncode, output, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()


def _all_of(file: IO[bytes]) -> str:
    # reading at a place of one's own: the process writes at the file's
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()
