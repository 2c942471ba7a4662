"""Forks behave as fresh processes do, and a server that must not be forked is not."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import write_tiny_recipe
from tests.warm_python import Python, WarmPython

from loraplex.comparison import workers
from loraplex.comparison.fork_server import ForkServer, NoForkServerError

PATIENCE = 120  # seconds, on a busy machine


@pytest.fixture(scope="module")
def light() -> Iterator[WarmPython]:
    """Forks of a server that has imported little."""
    with WarmPython(("random", "numpy")) as python:
        yield python


def server_with(module: str, folder: Path) -> ForkServer:
    """Return a server that imports a module with this source."""
    (folder / "imported.py").write_text(module)
    return ForkServer(["imported"], {**os.environ, "PYTHONPATH": str(folder)})


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()", "2 threads"),
        ("held = open('/dev/ptmx')", "/dev/pt[^ ]* is open after the imports"),
        ("import no_such_module", "the imports failed: No module named 'no_such_module'"),
    ],
)
def test_what_cannot_be_forked_is_refused(module: str, reason: str, tmp_path: Path) -> None:
    with server_with(module, tmp_path) as server:
        for _ in range(2):
            with pytest.raises(NoForkServerError, match=reason):
                server.wait_until_ready()
            reason = "the fork server has gone"


def test_a_server_with_what_a_job_imports_has_one_thread_before_and_after_forks(warm_python: WarmPython) -> None:
    server = warm_python.server
    for _ in range(2):
        assert warm_python.run("-c", "import torch; torch.ones(300, 300) @ torch.ones(300, 300)").returncode == 0
        assert len(list(Path(f"/proc/{server.pid}/task").iterdir())) == 1
    seen = warm_python.run("-c", "import torch, os; print(torch.cuda.is_initialized(), os.getppid())")
    assert seen.stdout == f"False {server.pid}\n"


def test_a_fork_ends_as_a_process_does(light: WarmPython) -> None:
    done = light.run("-c", "import sys; print(sys.argv, sys.path[0] == ''); print('aside', file=sys.stderr)", "a", "b")
    assert (done.returncode, done.stdout, done.stderr) == (0, "['-c', 'a', 'b'] True\n", "aside\n")
    failed = light.run("-c", "import atexit; atexit.register(print, 'at the end')\nraise ValueError('broken')")
    assert (failed.returncode, failed.stdout) == (1, "at the end\n")
    assert failed.stderr.splitlines()[-1] == "ValueError: broken"
    assert light.run("-c", "raise SystemExit(7)").returncode == 7
    said = light.run("-c", "raise SystemExit('no such file')")
    assert (said.returncode, said.stderr) == (1, "no such file\n")
    assert light.run("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL
    assert light.run("-c", "import os, signal; os.kill(os.getppid(), 0)").returncode == 0


def test_forks_draw_numbers_of_their_own(light: WarmPython) -> None:
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    drawn = [light.run("-c", code).stdout.split() for _ in range(3)]
    assert len({number for numbers in drawn for number in numbers}) == 6


def test_ctrl_c_ends_a_fork_and_not_the_server(light: WarmPython) -> None:
    sleep = "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('stopped')"
    code = f"import time\nprint('ready', flush=True)\n{sleep}"
    waiting = light.start("-c", code)
    _wait_for(lambda: waiting.written() == "ready\n", waiting)
    for pid in (light.server.pid, waiting.process.pid):
        os.kill(pid, signal.SIGINT)
    assert waiting.communicate(PATIENCE) == ("ready\nstopped\n", "")
    assert light.run("-c", "print('still there')").stdout == "still there\n"


def test_the_server_ends_with_the_process_that_holds_it() -> None:
    code = (
        "import time; from loraplex.comparison.fork_server import ForkServer\n"
        "server = ForkServer(['json']); server.wait_until_ready(); print(server.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        watched = os.pidfd_open(int(holder.stdout.readline()))
        holder.kill()
    try:
        # a pidfd is readable when its process has ended
        import select

        assert select.select([watched], [], [], PATIENCE)[0]
    finally:
        os.close(watched)


def test_a_request_that_cannot_be_served_leaves_the_server_as_it_is(light: WarmPython) -> None:
    with pytest.raises(NoForkServerError, match="bytes of arguments are too many"):
        light.run("-c", "#" * 200_000)
    assert light.run("-c", "print(1)").stdout == "1\n"


@pytest.mark.slow
def test_a_job_in_a_fork_gives_what_it_gives_in_a_fresh_process(
    tiny_model: Path, tmp_path: Path, warm_python: WarmPython
) -> None:
    recipe = write_tiny_recipe(tmp_path, tiny_model)
    words = ["-m", "loraplex.comparison.worker", "train", str(recipe)]
    # both have a thread each, and so the same order of every sum
    with subprocess.Popen(
        [sys.executable, *words, str(tmp_path / "fresh")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        steps = process.stdout.read()
    assert process.returncode == 0
    for name in ("forked", "again"):
        log = tmp_path / f"{name}.log"
        arguments = ["train", str(recipe), str(tmp_path / name)]
        lent = workers.Workers(server=warm_python.server)
        with log.open("w") as errors, lent.start(arguments, errors) as running:
            assert running.output.read() == steps
        assert running.process.returncode == 0, log.read_text()
        for file in ("adapter/adapter_model.safetensors", "evaluation/after.jsonl", "evaluation/before.jsonl"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "fresh" / file).read_bytes(), file
        mine, theirs = (json.loads((tmp_path / f / "metrics.json").read_text()) for f in (name, "fresh"))
        for key in ("loss", "accuracy", "parameters", "flops_per_token", "rows", "steps"):
            assert mine[key] == theirs[key], key
    assert steps == "".join(f"@step {step}\n" for step in range(1, 7))


@pytest.mark.slow
def test_without_a_fork_server_jobs_are_fresh_processes_and_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "MODULES", ("no_such_module",))
    log = tmp_path / "log"
    with caplog.at_level(logging.INFO), workers.Workers(threads=1) as fresh, log.open("w") as errors:
        fresh.prepare()
        with fresh.start(["train", str(tmp_path / "missing.yaml"), str(tmp_path / "out")], errors) as running:
            assert running.output.read() == ""
    assert running.process.returncode == 1
    assert isinstance(running.output, io.TextIOBase)
    assert f"there is no recipe '{tmp_path / 'missing.yaml'}'" in log.read_text()
    assert "every run imports torch and transformers anew: the imports failed" in caplog.text


def _wait_for(true: object, process: Python) -> None:
    assert callable(true)
    deadline = time.monotonic() + PATIENCE
    while not true() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()
