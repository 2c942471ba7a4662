"""Singular values of BA against those of the product formed in full."""

import pytest
import torch

from loraplex.analysis.spectrum import singular_values, stable_rank


@pytest.mark.parametrize(
    ("r", "inputs", "outputs"), [(1, 5, 7), (4, 40, 30), (6, 6, 9), (8, 5, 11), (8, 11, 5), (9, 4, 3)]
)
def test_they_are_those_of_the_dense_product(r: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(r)
    a, b = torch.randn(r, inputs, generator=generator), torch.randn(outputs, r, generator=generator)
    found = singular_values(a, b)
    assert len(found) == min(r, inputs, outputs)
    dense = torch.linalg.svdvals(b.double() @ a.double())
    torch.testing.assert_close(found, dense[: len(found)], rtol=1e-10, atol=1e-12)


def test_equal_directions_are_one() -> None:
    a = torch.randn(1, 10).repeat(4, 1)
    found = singular_values(a, torch.randn(6, 4))
    assert found[0] > 0
    assert (found[1:] < 1e-6 * found[0]).all()
    assert stable_rank(found) == pytest.approx(1)


def test_the_stable_rank_counts_equal_values_and_is_0_for_nothing() -> None:
    assert stable_rank(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert stable_rank(torch.tensor([1.0, 0.5])) == pytest.approx(1.25)
    assert stable_rank(torch.zeros(3)) == 0
    assert stable_rank(torch.zeros(0)) == 0
