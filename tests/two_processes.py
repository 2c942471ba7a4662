"""Two processes of one test: a worker script under torchrun, and how it ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist


def run_two(script: Path, *arguments: str) -> str:
    """Run a script in two processes and return what they printed; a failure of one fails the test."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(script), *arguments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def end_as_equal() -> None:
    """End a worker whose assertions all held: the first process says "equal"."""
    if dist.get_rank() == 0:
        sys.stdout.write("equal\n")
    sys.stdout.flush()
    dist.barrier()
    # whoever ends first must not take the other's connection away
    time.sleep(1)
    # on a busy machine gloo's threads do not always come to an end
    os._exit(0)
