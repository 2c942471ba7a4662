"""Allocations in two processes that see different rows."""

from pathlib import Path

import pytest
from tests.two_processes import run_two
from tests.warm_python import WarmPython


@pytest.mark.slow
def test_two_processes_decide_alike_and_as_one_does(tmp_path: Path, warm_python: WarmPython) -> None:
    assert "equal" in run_two(warm_python, Path(__file__).with_name("two_processes_worker.py"), str(tmp_path))
