"""The fused low-rank linear against the plain products, in every combination of what asks for a gradient."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from loraplex.kernels.low_rank import low_rank_linear


def tensors(dtype=torch.float64):
    torch.manual_seed(0)
    shapes = {
        "x": (3, 5, 7),
        "dropped": (3, 5, 7),
        "weight": (11, 7),
        "bias": (11,),
        "a": (2, 7),
        "b": (11, 2),
        "s": (2,),
    }
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def naive(x, dropped, weight, bias, a, b, s):
    return F.linear(x, weight, bias) + (x if dropped is None else dropped) @ a.T @ (b * s).T


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize(
    "asked", [names for n in (1, 2, 4) for names in itertools.combinations(["x", "bias", "a", "b"], n)]
)
def test_values_and_requested_gradients_equal_the_plain_products(dropout, asked):
    given = tensors()
    if not dropout:
        given["dropped"] = None
    names = [*asked, "dropped"] if dropout and "x" in asked else list(asked)
    wanted = [given[name].requires_grad_() for name in names]
    ours, theirs = low_rank_linear(**given), naive(**given)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(ours)
    for mine, reference in zip(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(theirs, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-11)


def test_under_autocast_it_runs_in_bfloat16_and_returns_gradients_in_the_dtype_of_the_pair():
    given = tensors(torch.float32) | {"dropped": None}
    given["a"].requires_grad_()
    given["b"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = low_rank_linear(**given)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), naive(**given), rtol=0.02, atol=0.1)
    y.sum().backward()
    assert given["a"].grad.dtype == given["b"].grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_ranks_beyond_the_given_scales_add_nothing_and_have_no_gradient(dtype):
    given = tensors() | {"dropped": None}
    for name in ("x", "weight", "bias"):
        given[name] = given[name].to(dtype)
    found = []
    for s in (given["s"][:1], given["s"] * torch.tensor([1.0, 0.0])):
        a, b = (given[name].clone().requires_grad_() for name in ("a", "b"))
        y = low_rank_linear(**given | {"a": a, "b": b, "s": s})
        y.backward(torch.ones_like(y))
        found.append((y.detach(), a.grad, b.grad))
    for short, full in zip(*found, strict=True):
        assert short.dtype == full.dtype
        torch.testing.assert_close(short, full, rtol=1e-12 if dtype == torch.float64 else 1e-2, atol=1e-12)
    assert not found[0][1][1].any()
    assert not found[0][2][:, 1].any()
    assert found[0][1].any()


def test_double_precision_gradcheck():
    given = tensors()
    x, a, b = (given[name].requires_grad_() for name in ("x", "a", "b"))
    assert torch.autograd.gradcheck(
        lambda x, a, b: low_rank_linear(x, None, given["weight"], given["bias"], a, b, given["s"]), (x, a, b)
    )


def test_the_input_below_the_lowest_site_costs_no_product():
    def backward_flops(of_input: bool) -> int:
        given = tensors() | {"dropped": None}
        given["x"].requires_grad_(of_input)
        given["a"].requires_grad_()
        y = low_rank_linear(**given)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        return counter.get_total_flops()

    # the counter does not see in-place addmm, so this is dy W0 alone
    rows, d_in, d_out = 15, 7, 11
    assert backward_flops(True) - backward_flops(False) == 2 * rows * d_in * d_out
