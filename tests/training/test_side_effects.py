"""What a training run in a program leaves as it was, and that memory is measured on every system."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex.training.reading import read_recipe
from loraplex.training.run import train
from loraplex.training.trainer import Interruption


def test_a_run_leaves_the_environment_alone(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    handler = signal.getsignal(signal.SIGINT)
    train(read_recipe(tiny_recipe, ["--max-steps", "1"]))
    assert "HF_HUB_DISABLE_TELEMETRY" not in os.environ
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_command_line_sends_no_usage_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    from loraplex.cli.main import main

    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    assert main(["train", "--help"]) == 0
    # what the user has set stays
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    assert main(["train", "--help"]) == 0
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_an_interruption_puts_the_handler_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        assert signal.getsignal(signal.SIGINT) is not before
        signal.raise_signal(signal.SIGINT)
        assert interruption.asked
    assert signal.getsignal(signal.SIGINT) is before


def test_memory_is_measured_without_a_module_that_windows_lacks() -> None:
    code = (
        "import psutil, torch, sys; sys.modules['resource'] = None\n"
        "from loraplex.training.memory import peak, start_peak\n"
        "start = start_peak(); kept = bytearray(1 << 26)\n"
        "assert 0 < start < peak()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
