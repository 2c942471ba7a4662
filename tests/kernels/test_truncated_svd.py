"""The randomized decomposition against the full one, and the same bits whatever computes it."""

import os
import subprocess
import sys

import pytest
import torch

from loraplex.kernels.truncated_svd import truncated_svd

SHAPES = pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64), (5, 3)], ids=str)


def decaying(out_features: int, in_features: int) -> torch.Tensor:
    torch.manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(out_features, in_features), full_matrices=False)
    return u @ (s * 0.9 ** torch.arange(len(s))).diag() @ vh


@SHAPES
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "randomized"])
def test_leading_singular_vectors_with_fixed_signs(shape, exact):
    weight = decaying(*shape)
    rank = min(8, *shape)
    u, s, vh = truncated_svd(weight, rank, exact=exact)
    full_u, full_s, full_vh = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(s, full_s[:rank], rtol=1e-6, atol=0)
    product, expected = u @ s.diag() @ vh, full_u[:, :rank] @ full_s[:rank].diag() @ full_vh[:rank]
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(u.T @ u, torch.eye(rank).double(), rtol=0, atol=1e-12)
    assert (u.gather(0, u.abs().argmax(0)[None]) > 0).all()


def test_bfloat16_and_the_float32_it_was_widened_to_give_the_same():
    weight = decaying(40, 90).bfloat16()
    for mine, theirs in zip(truncated_svd(weight, 6), truncated_svd(weight.float(), 6), strict=True):
        assert torch.equal(mine, theirs)


def test_another_number_of_threads_changes_nothing_that_float32_shows():
    code = (
        "import torch; from loraplex.kernels.truncated_svd import truncated_svd; torch.manual_seed(1);"
        "u, s, vh = truncated_svd(torch.randn(300, 200), 24); print((s[:, None] * vh).float().flatten()[::97].tolist())"
    )
    printed = []
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        printed.append(torch.tensor(eval(done.stdout)))
    torch.testing.assert_close(printed[0], printed[1], rtol=1e-6, atol=1e-6)
