"""The objective in two processes."""

from pathlib import Path

import pytest
from tests.two_processes import run_two
from tests.warm_python import WarmPython


@pytest.mark.slow
def test_two_processes_draw_alike_and_have_the_gradients_of_the_whole_batch(warm_python: WarmPython):
    assert "equal" in run_two(warm_python, Path(__file__).with_name("ddp_worker.py"))
