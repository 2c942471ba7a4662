"""The contract every legal adapter keeps, on single sites; what registers is tested."""

import dataclasses
import re

import pytest
import torch
from tests.contract.sites import adapters, build, fits, label
from torch.utils.flop_counter import FlopCounterMode

from loraplex import Adapter, Add, LoRA
from loraplex.errors import UserError

EVERY = pytest.mark.parametrize("options", adapters(), ids=label)
MERGEABLE = pytest.mark.parametrize("options", [options for options in adapters() if options.mergeable], ids=label)
# odd, wide, tall, and a rank above the shorter side where the method allows it
SHAPES = [(7, 5, 2), (5, 11, 3), (16, 16, 1), (3, 9, 4)]
EVERY_THAT_FITS = pytest.mark.parametrize(
    ("options", "shape"),
    [
        pytest.param(options, shape, id=f"{label(options)}-{shape}")
        for options in adapters()
        for shape in SHAPES
        if fits(options, *shape)
    ],
)
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


def evaluate(text: str, **sizes: int) -> int:
    """Evaluate a parameter formula of a method's record; its names are r, in, out and the method's options."""
    text = re.sub(r"⌈([^⌉]+)/([^⌉]+)⌉", r"(-(-\1//\2))", text.replace("·", "*").replace("−", "-").replace("²", "**2"))
    return eval(re.sub(r"\bin\b", "width", text), {}, {**sizes, "width": sizes["in"]})


@EVERY_THAT_FITS
@BIAS
@pytest.mark.parametrize("path", ["forward", "sum_of_deltas"])
def test_output_and_gradients_equal_the_oracle(options, shape, bias, path):
    site = build(options, *shape, bias=bias)
    x = torch.randn(2, 4, shape[0], dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 4, shape[1], dtype=torch.float64)
    wanted = [x, *site.adapter.parameters()]

    ours, theirs = getattr(site, path)(x), site.reference(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    for mine, reference in zip(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(theirs, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-11)


@EVERY
@BIAS
@pytest.mark.parametrize("closed", [[0], [1, 2], [0, 1, 2]], ids=str)
def test_closed_ranks_equal_the_oracle_and_all_closed_is_the_base(options, bias, closed):
    site = build(options, 7, 5, 3, bias=bias)
    site.adapter.factors.gate[closed] = 0
    x = torch.randn(6, 7, dtype=torch.float64)
    for output in (site.forward(x), site.sum_of_deltas(x)):
        torch.testing.assert_close(output, site.reference(x), rtol=1e-11, atol=1e-11)
        if len(closed) == 3:
            assert torch.equal(output, site.base(x))


@pytest.mark.parametrize("options", [options for options in adapters() if fits(options, 35, 33, 33)], ids=label)
@pytest.mark.parametrize("last", [1, 16, 17], ids="last={}".format)
def test_a_tail_of_closed_ranks_equals_the_oracle_with_its_gradients(options, last):
    """Ranks behind the last open one are not computed, in steps of sixteen."""
    site = build(options, 35, 33, 33)
    site.adapter.factors.gate[last:] = 0
    if last > 2:
        site.adapter.factors.gate[2] = 0
    x = torch.randn(6, 35, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(6, 33, dtype=torch.float64)
    wanted = [x, *site.adapter.parameters()]
    ours, theirs = site.forward(x), site.reference(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    for mine, reference in zip(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(theirs, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-11)


def test_a_tail_of_closed_ranks_is_not_computed():
    def flops(closed):
        site = build(Adapter(LoRA(), Add()), 35, 33, 32)
        site.adapter.factors.gate[32 - closed :] = 0
        with FlopCounterMode(display=False) as counter:
            site.forward(torch.randn(6, 35, dtype=torch.float64)).sum().backward()
        return counter.get_total_flops()

    assert flops(16) < flops(15) == flops(0)


@EVERY_THAT_FITS
def test_starts_as_the_identity(options, shape):
    site = build(options, *shape, perturb=False, dtype=torch.float32)
    x = torch.randn(5, shape[0])
    assert torch.equal(site.forward(x), site.base(x))


@MERGEABLE
@BIAS
def test_merged_weight_gives_the_same_output(options, bias):
    site = build(options, 7, 5, 2, bias=bias)
    x = torch.randn(6, 7, dtype=torch.float64)
    merged = site.base.weight + site.adapter.delta_weight(site.base.weight)
    expected = torch.nn.functional.linear(x, merged, site.base.bias)
    torch.testing.assert_close(site.forward(x), expected, rtol=1e-11, atol=1e-11)


@EVERY
def test_compacting_leaves_the_product_unchanged(options):
    site = build(options, 7, 5, 3)
    factors = site.adapter.factors
    factors.gate[1] = 0
    a, b = factors.pair()
    small_a, small_b = factors.compact()
    assert small_a.shape == (2 * len(a) // 3, 7)
    assert small_b.shape == (5, 2 * b.shape[1] // 3)
    for head, small in zip(b.chunk(factors.heads, dim=1), small_b.chunk(factors.heads, dim=1), strict=True):
        torch.testing.assert_close(small @ small_a, head @ a, rtol=1e-13, atol=1e-13)


@EVERY_THAT_FITS
def test_parameter_count_is_the_formula_of_the_records(options, shape):
    site = build(options, *shape)
    sizes = dict(zip(("in", "out", "r"), shape, strict=True))
    values = sizes | dataclasses.asdict(options.combine) | dataclasses.asdict(options.factors)
    formula = sum(evaluate(method.parameters, **values) for method in options.methods)
    assert sum(p.numel() for p in site.adapter.parameters() if p.requires_grad) == formula


@EVERY
def test_initialization_depends_on_seed_and_name_only(options):
    def tensors(**changed):
        torch.rand(13)  # the global generator must not matter
        site = build(options, 7, 5, 2, perturb=False, **changed)
        return torch.cat([p.detach().flatten() for p in site.adapter.parameters()])

    assert torch.equal(tensors(), tensors())
    # an identity may be all zeros; a tied tensor belongs to the kind of its site, the last part of the name
    away = tensors(identity=False)
    assert torch.equal(away, tensors(identity=False))
    assert not torch.equal(away, tensors())
    assert not torch.equal(away, tensors(identity=False, seed=8))
    assert not torch.equal(away, tensors(identity=False, name="layers.0.other"))


@EVERY
def test_gradient_reaches_every_trainable_and_nothing_else(options):
    site = build(options, 7, 5, 2)
    site.forward(torch.randn(6, 7, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in site.adapter.parameters())
    assert site.base.weight.grad is None
    assert site.base.bias.grad is None


@EVERY
def test_dropout_acts_on_the_adapter_only_while_training(options):
    site = build(options, 32, 16, 2, dropout=0.5)
    x = torch.randn(64, 32, dtype=torch.float64)
    site.adapter.train()
    torch.manual_seed(0)
    first = site.forward(x)
    torch.manual_seed(1)
    assert not torch.equal(first, site.forward(x))
    site.adapter.eval()
    torch.testing.assert_close(site.forward(x), site.reference(x), rtol=1e-11, atol=1e-11)


@EVERY
def test_rank_above_the_limit_of_the_site_is_named(options):
    limit = options.factors.largest_rank(7, 5)
    from loraplex.adapters.contracts import check_rank

    assert check_rank("layers.0.site", limit, limit) == limit
    with pytest.raises(UserError, match=rf"rank of layers\.0\.site is {limit + 1}.*at most {limit}"):
        check_rank("layers.0.site", limit + 1, limit)
