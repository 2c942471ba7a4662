"""Errors of the machine are told from errors of what was asked for."""

import errno

import pytest
import torch

from loraplex.errors import is_out_of_memory, remedy_here


def test_a_tensor_that_finds_no_room_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("unable to mmap 308400416 bytes from file </m/model.safetensors>: Cannot allocate memory (12)"),
    ],
)
def test_every_way_of_saying_it_is_known(error: Exception) -> None:
    assert "not enough memory" in str(remedy_here(error))


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "right"), (errno.EMFILE, "open")]
)
def test_troubles_of_the_disk_have_their_own_remedies(number: int, remedy: str) -> None:
    assert remedy in str(remedy_here(OSError(number, "no")))


@pytest.mark.parametrize(
    "error", [OSError("no such model"), ValueError("out of memory"), RuntimeError("shapes"), KeyError()]
)
def test_other_errors_are_not_the_machines(error: Exception) -> None:
    assert remedy_here(error) is None
