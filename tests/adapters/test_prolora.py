"""PRoLoRA where it is LoRA, on widths that its copies do not divide, and what it refuses."""

import pytest
import torch
from tests.adapters.large_shapes import ALL, count
from tests.contract.sites import build
from torch import nn

from loraplex import Adapter, Add, LoRA, UserError
from loraplex.adapters.contracts import SiteInit
from loraplex.adapters.prolora import PRoLoRA


def site(in_features=7, out_features=5, rank=4, **fields) -> SiteInit:
    weight = torch.zeros(out_features, in_features)
    return SiteInit("layers.0.site", in_features, out_features, rank, 6.0, 3, lambda: weight, **fields)


@pytest.mark.parametrize("options", [PRoLoRA(u=0, m=1, n=1), PRoLoRA(u=4, m=2, n=3)], ids=["m=n=1", "u=r"])
def test_without_sharing_it_is_lora(options):
    theirs, ours = LoRA().build(site()), options.build(site())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    # drawn alike too: the bound is that of the full width
    for mine, other in zip(ours.pair(), theirs.pair(), strict=True):
        assert torch.equal(mine, other)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other += torch.randn_like(other)
            mine.copy_(other)
    for mine, other in zip(ours.pair(), theirs.pair(), strict=True):
        assert torch.equal(mine, other)


def test_the_figure_of_the_paper():
    """r = 4, u = 1, m = 2, n = 3: the stride is taken from r − u."""
    factors = PRoLoRA(u=1, m=2, n=3).build(site(in_features=4, out_features=6))
    with torch.no_grad():
        factors.lora_A.copy_(torch.arange(6.0).view(3, 2))
        factors.lora_B.copy_(torch.arange(6.0).view(2, 3))
        factors.lora_A_unshared.fill_(9)
        factors.lora_B_unshared.fill_(9)
    a, b = factors.raw_pair()
    assert a.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 0, 1], [9, 9, 9, 9]]
    assert b.tolist() == [[0, 1, 2, 9], [3, 4, 5, 9], [1, 2, 0, 9], [4, 5, 3, 9], [2, 0, 1, 9], [5, 3, 4, 9]]


def test_rectified_initialization_has_the_bound_of_the_full_width():
    factors = PRoLoRA(u=2, m=8, n=8).build(site(in_features=512, out_features=64, rank=16))
    bound = 512**-0.5
    for parameter in (factors.lora_A, factors.lora_A_unshared):
        assert bound * 0.9 < parameter.abs().max() <= bound
    assert not factors.lora_B.any()


@pytest.mark.parametrize(("m", "n"), [(2, 3), (5, 4), (9, 9)])
def test_any_shape_and_the_number_of_parameters(m, n):
    for in_features, out_features, rank in ((7, 5, 3), (3, 11, 4), (1, 9, 2)):
        built = build(Adapter(PRoLoRA(u=1, m=m, n=n), Add()), in_features, out_features, rank)
        a, b = built.adapter.factors.raw_pair()
        assert (a.shape, b.shape) == ((rank, in_features), (out_features, rank))
        counted = sum(p.numel() for p in built.adapter.parameters())
        assert counted == (in_features + out_features) + (rank - 1) * (-(-in_features // m) - (-out_features // n))


@pytest.mark.parametrize("kv_heads", [32, 8], ids=["one head each", "grouped queries"])
def test_counts_on_llama_2_7b(kv_heads):
    d, kv, wide = 4096, kv_heads * 128, 11008
    shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, wide), (d, wide), (wide, d)]
    expected = 32 * sum(2 * (i + o) + 14 * (-(-i // 4) - (-o // 3)) for i, o in shapes)
    assert count({"name": "prolora", "u": 2, "m": 4, "n": 3}, 16, ALL, num_key_value_heads=kv_heads) == expected


def test_more_unshared_ranks_than_ranks_are_refused_by_site():
    with pytest.raises(UserError, match=r"rank of layers\.0\.site is 4, but u = 5.*raise r or lower u"):
        PRoLoRA(u=5).build(site())


@pytest.mark.parametrize("fields", [{"u": -1}, {"m": 0}, {"n": 1.5}, {"u": True}])
def test_numbers_out_of_range_are_refused(fields):
    with pytest.raises(UserError, match=r"of PRoLoRA is .*: give a whole number"):
        PRoLoRA(**fields)


def test_rotation_follows_its_module_to_other_types():
    factors = PRoLoRA().build(site()).to(torch.bfloat16)
    assert isinstance(factors, nn.Module)
    assert factors.rows_a.dtype is torch.int64
    assert factors.raw_pair()[0].dtype is torch.bfloat16
