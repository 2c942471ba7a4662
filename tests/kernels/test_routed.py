"""The fused routed linear against the loop over heads, in every combination of what asks for a gradient."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from loraplex.kernels.routed import balanced, routed_linear, softmax_gates

RANK, HEADS = 2, 3


def tensors(dtype=torch.float64):
    torch.manual_seed(0)
    shapes = {
        "x": (3, 5, 7),
        "dropped": (3, 5, 7),
        "weight": (11, 7),
        "bias": (11,),
        "a": (RANK, 7),
        "b": (11, HEADS * RANK),
        "router": (HEADS, 7),
    }
    given = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    return given | {"s": torch.randn(RANK, dtype=dtype).repeat(HEADS)}


def naive(x, dropped, weight, bias, a, b, s, router, top_k=None):
    logits = x @ router.T
    if top_k is not None:
        smallest_kept = logits.sort(dim=-1, descending=True).values[..., top_k - 1 : top_k]
        logits = torch.where(logits >= smallest_kept, logits, -torch.inf)
    gates = logits.softmax(-1)
    y = F.linear(x, weight, bias)
    for head in range(HEADS):
        columns = slice(head * RANK, (head + 1) * RANK)
        y = y + gates[..., head, None] * ((x if dropped is None else dropped) @ a.T @ (b[:, columns] * s[columns]).T)
    return y, gates.reshape(-1, HEADS)


@pytest.mark.parametrize("top_k", [None, 2, 3])
@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize(
    "asked", [c for n in (1, 2, 5) for c in itertools.combinations(["x", "bias", "a", "b", "router"], n)]
)
def test_values_and_requested_gradients_equal_the_loop(dropout, asked, top_k):
    given = tensors()
    if not dropout:
        given["dropped"] = None
    names = [*asked, "dropped"] if dropout and "x" in asked else list(asked)
    wanted = [given[name].requires_grad_() for name in names]
    ours, theirs = routed_linear(**given, top_k=top_k), naive(**given, top_k=top_k)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)
    # of the output alone, and together with a loss on the gates
    upstream = [torch.randn_like(value) for value in ours]
    for count in (1, 2):
        if count == 2 and not {"x", "router"} & set(asked):
            continue
        mine, reference = (
            torch.autograd.grad(values[:count], wanted, upstream[:count], retain_graph=True, allow_unused=True)
            for values in (ours, theirs)
        )
        for left, right in zip(mine, reference, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


def test_a_loss_on_the_gates_alone_reaches_the_router():
    given = tensors() | {"dropped": None}
    given["router"].requires_grad_()
    ours, theirs = (
        torch.autograd.grad(function(**given)[1].square().sum(), given["router"])[0]
        for function in (routed_linear, naive)
    )
    assert ours.abs().sum() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def squared_variation(gates):
    """Return (standard deviation / mean)² of the heads' summed gates, from its definition."""
    loads = gates.reshape(-1, HEADS).sum(0)
    return loads.var(correction=0) / loads.mean() ** 2


@pytest.mark.parametrize("top_k", [None, 2])
def test_balancing_adds_the_gradient_of_the_squared_variation_of_the_loads(top_k):
    given = tensors() | {"dropped": None}
    wanted = [given[name].requires_grad_() for name in ("x", "a", "b", "router")]
    y, gates = naive(**given, top_k=top_k)
    upstream = torch.randn_like(y)
    expected = torch.autograd.grad((y * upstream).sum() + 0.3 * squared_variation(gates), wanted)
    ours = routed_linear(**given, top_k=top_k, balance=0.3)[0]
    torch.testing.assert_close(ours, y, rtol=1e-12, atol=1e-12)
    for mine, reference in zip(torch.autograd.grad(ours, wanted, upstream), expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-11)


def test_balancing_apart_from_the_kernel():
    logits = torch.randn(2, 5, HEADS, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, HEADS, dtype=torch.float64)
    gates = softmax_gates(logits)
    (expected,) = torch.autograd.grad((gates * upstream).sum() + 0.3 * squared_variation(gates), logits)
    (mine,) = torch.autograd.grad(balanced(softmax_gates(logits), 0.3), logits, upstream)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_under_autocast_the_softmax_is_float32_and_gradients_have_the_dtype_of_their_matrix():
    given = tensors(torch.float32) | {"dropped": None}
    for name in ("a", "b", "router"):
        given[name].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, gates = routed_linear(**given)
    assert y.dtype == torch.bfloat16
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates.sum(1), torch.ones(15), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y.float(), naive(**given)[0], rtol=0.03, atol=0.15)
    y.sum().backward()
    assert all(given[name].grad.dtype == torch.float32 for name in ("a", "b", "router"))


def test_double_precision_gradcheck():
    given = tensors() | {"dropped": None}
    names = ("x", "a", "b", "router")
    leaves = [given[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *values: routed_linear(**(given | dict(zip(names, values, strict=True)))), leaves
    )


def test_a_is_multiplied_once_and_all_heads_together():
    given = tensors() | {"dropped": None}
    with FlopCounterMode(display=False) as counter:
        routed_linear(**given)
    rows, d_in, d_out = 15, 7, 11
    frozen, first = 2 * rows * d_in * d_out, 2 * rows * d_in * (RANK + HEADS)
    # the counter does not see in-place addmm, the product with the heads
    assert counter.get_total_flops() == frozen + first


def test_the_wide_product_is_not_kept_for_the_backward_pass():
    given = tensors() | {"dropped": None}
    given["b"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        routed_linear(**given)
    assert saved
    assert not any(tensor.shape == (15, HEADS * RANK) for tensor in saved)
