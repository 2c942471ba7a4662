"""A Python process whose imports are done and that forks itself for every job: a job starts at once.

Run as a script it is the server: python -P fork_server.py SOCKET MODULE... imports the modules, says on the socket
whether it can be forked, and then forks for every request. The file imports the standard library alone, so that a
server knows the modules it is told and no others.

A fork is as good as a fresh process only while the server has a single thread and has opened no accelerator: a thread
is not there in the fork, whatever it held, and an accelerator's driver does not survive one. The server looks at both,
in /proc, before it forks, and refuses otherwise. Linux alone has what this needs.

`multiprocessing` has a fork server too. It runs the user's main module again in every process, which repeats a script
that has no `if __name__ == "__main__"`, and it does not look at threads.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Arrow's second allocator, which is not the one that it uses, starts a thread when it is loaded unless told not to.
QUIET_ARROW = ("JE_ARROW_MALLOC_CONF", "background_thread:false")
# Devices that are no accelerators.
HARMLESS = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/pts/", "/dev/shm/")
LARGEST_REQUEST = 1 << 17
"""Bytes; what a socket of this kind takes in one message."""


class NoForkServerError(Exception):
    """There is no fork server, or it will not fork; the message says why."""


class ForkServer:
    """The side of whoever wants forks. The server ends when this is closed, or with the process that holds it."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start a server that imports `modules`; it goes on importing while the caller does something else."""
        if not sys.platform.startswith("linux") or not hasattr(os, "pidfd_open"):
            raise NoForkServerError("processes can be forked safely on Linux alone")
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        self._is_ready = False
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Return when the imports are done.

        Raises:
            NoForkServerError: they failed, or left a thread or an accelerator behind.
        """
        with self._lock:
            if not self._is_ready:
                self._receive()
                self._is_ready = True

    def fork(self, function: str, arguments: Sequence[str], files: Sequence[int]) -> ForkedProcess:
        """Return a fork that calls `function`, "module:name", with the list `arguments`; its result is the exit status.

        `files` are the descriptors that become its standard input, output and error; the caller still closes them.

        Raises:
            NoForkServerError: when the server has gone, or has more than one thread by now.
        """
        self.wait_until_ready()
        request = json.dumps({"function": function, "arguments": list(arguments)}).encode()
        if len(request) > LARGEST_REQUEST:
            raise NoForkServerError(f"{len(request)} bytes of arguments are too many")
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            try:
                socket.send_fds(self._socket, [request], [*files, theirs.fileno()])
            except OSError as error:
                ours.close()
                raise NoForkServerError(f"the fork server has gone ({error})") from error
            try:
                return ForkedProcess(int(self._receive()["pid"]), ours)
            except NoForkServerError:
                ours.close()
                raise

    def close(self) -> None:
        """End the server; forks live on."""
        self._socket.close()
        if not self._is_ready:
            # it would only notice after its imports
            self._process.terminate()
        self._process.wait()

    def __enter__(self) -> ForkServer:
        """Return the server."""
        return self

    def __exit__(self, *failure: object) -> None:
        """End the server."""
        self.close()

    def _receive(self) -> dict[str, Any]:
        try:
            message = self._socket.recv(LARGEST_REQUEST)
        except OSError as error:
            raise NoForkServerError(f"the fork server has gone ({error})") from error
        if not message:
            raise NoForkServerError("the fork server has gone")
        answer: dict[str, Any] = json.loads(message)
        if refusal := answer.get("refusal"):
            raise NoForkServerError(str(refusal))
        return answer


class ForkedProcess:
    """One fork: its process id, and how it ended."""

    def __init__(self, pid: int, status: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """As of `subprocess.Popen`: the exit status, or minus the signal that ended it. None before the end."""
        self._status = status

    def wait(self, timeout: float | None = None) -> int:
        """Return the status when the fork has ended; 1 where the server, which alone is told, ended before.

        Raises:
            TimeoutError: it has not ended within so many seconds.
        """
        if self.returncode is None:
            self._status.settimeout(timeout)
            told = self._status.recv(64)
            self._status.close()
            self.returncode = int(told) if told else 1
        return self.returncode

    def poll(self) -> int | None:
        """Return the status, None while the fork runs."""
        with contextlib.suppress(BlockingIOError):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        """Send a signal to the fork unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


@dataclass(frozen=True)
class _Request:
    """What a fork has to do, as it finds it after the fork."""

    function: str
    arguments: list[str]
    files: list[int]

    def carry_out(self) -> int:
        """Become what a fresh process would be, do it, and return the exit status."""
        for standard, file in enumerate(self.files):
            os.dup2(file, standard)
            os.close(file)
        if "numpy" in sys.modules:
            # a fresh process draws its own; Python's generator sees to that itself
            sys.modules["numpy"].random.seed()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        module, _, name = self.function.partition(":")
        sys.argv = [module, *self.arguments]
        try:
            return int(getattr(importlib.import_module(module), name)(self.arguments))
        except SystemExit as end:
            if end.code is None or isinstance(end.code, int):
                return end.code or 0
            sys.stderr.write(f"{end.code}\n")
            return 1


class _Ending:
    """Ends a fork when all else that was to be done at its end is done, and leaves its memory as it is.

    Python would take every object apart, and so copy all that fork and server share: seconds for nothing.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        """None in the server."""
        # the first to be registered is the last to be called
        atexit.register(self)

    def __call__(self) -> None:
        """End the process."""
        if self.status is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.status)


def main(arguments: Sequence[str]) -> int:
    """Be the server until the other side is closed; in a fork, do what was asked and return its status."""
    ending = _Ending()
    # Ctrl-C is for the forks, which are of the same process group; none of them may miss it before it is ready for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    with socket.socket(fileno=int(arguments[0])) as control:
        refusal = _import(arguments[1:])
        control.send(json.dumps({"refusal": refusal}).encode())
        request = None if refusal else _serve(control)
    if request is None:
        return 0
    # of a fork that ends with an exception
    ending.status = 1
    ending.status = request.carry_out()
    return ending.status


def _import(modules: Sequence[str]) -> str | None:
    """Import the modules and return why this process cannot be forked, None if it can."""
    name, value = QUIET_ARROW
    before = os.environ.setdefault(name, value)
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception as error:
        return f"the imports failed: {error}"
    if before == value:
        del os.environ[name]
    # What is there now is of use to all forks: none of them looks for garbage in it, which would copy it.
    gc.collect()
    gc.freeze()
    # OpenBLAS starts threads when it is loaded and ends them at a fork, to start them again where they are needed: this
    # fork is for that alone.
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        os.close(os.pidfd_open(pid))
    except OSError as error:
        return f"this system does not let a process watch its forks: {error}"
    finally:
        os.waitpid(pid, 0)
    return _unfit()


def _unfit() -> str | None:
    """Return why this process cannot be forked now, None if it can."""
    if (threads := len(os.listdir("/proc/self/task"))) > 1:  # noqa: PTH208  (a name is enough)
        return f"{threads} threads run after the imports"
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            opened = os.readlink(entry)  # noqa: PTH115  (no path: sockets and pipes are links too)
            if opened.startswith("/dev/") and not opened.startswith(HARMLESS):
                return f"{opened} is open after the imports"
    return None


def _serve(control: socket.socket) -> _Request | None:
    """Fork for every request; return the request in the fork, and None in the server when nobody asks any more."""
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not control:
                    _report(selector, key)
                    continue
                message, files, _, _ = socket.recv_fds(control, LARGEST_REQUEST, 4)
                if not message:
                    return None
                if refusal := _unfit():
                    control.send(json.dumps({"refusal": refusal}).encode())
                elif (pid := os.fork()) == 0:
                    _forget(selector, control)
                    os.close(files.pop())
                    return _Request(**json.loads(message), files=files)
                else:
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, files.pop()))
                    control.send(json.dumps({"pid": pid}).encode())
                for file in files:
                    os.close(file)


def _report(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    """Tell how a fork has ended to whoever asked for it."""
    pid, status = key.data
    selector.unregister(key.fileobj)
    os.close(key.fd)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        os.write(status, str(ended).encode())
    os.close(status)


def _forget(selector: selectors.BaseSelector, control: socket.socket) -> None:
    """Close what belongs to the server and to its other forks."""
    for key in list(selector.get_map().values()):
        if key.fileobj is not control:
            os.close(key.fd)
            os.close(key.data[1])
    control.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
