"""Two processes of one test: a worker script in both, with the variables that torchrun sets, and how it ends."""

import os
import socket
import sys
import time
from pathlib import Path

import torch.distributed as dist
from tests.warm_python import WarmPython


def run_two(python: WarmPython, script: Path, *arguments: str) -> str:
    """Run a script in two processes and return what they printed; a failure of one fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        python.start(
            str(script),
            *arguments,
            cwd=Path(__file__).parents[1],
            env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    try:
        ended = [process.communicate(300) for process in processes]
    finally:
        for process in processes:
            process.send_signal(9)
    assert [process.returncode for process in processes] == [0, 0], [error[-3000:] for _, error in ended]
    return "".join(output for output, _ in ended)


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
