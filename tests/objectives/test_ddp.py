"""The objective in two processes."""

from pathlib import Path

import pytest
from tests.two_processes import run_two


@pytest.mark.slow
def test_two_processes_draw_alike_and_have_the_gradients_of_the_whole_batch():
    assert "equal" in run_two(Path(__file__).with_name("ddp_worker.py"))
