"""Attention over sequences end to end against a naive loop in float64, values and gradients."""

import pytest
import torch

from loraplex.kernels import sequence_attention as module
from loraplex.kernels.sequence_attention import sequence_attention


def naive(query, key, value, lengths, scale):
    group = query.shape[1] // key.shape[1]
    rows, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        start += length
        out = []
        for head in range(query.shape[1]):
            q, k, v = query[0, head, part], key[0, head // group, part], value[0, head // group, part]
            scores = scale * q @ k.T
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
            out.append(scores.softmax(-1) @ v)
        rows.append(torch.stack(out, 1))
    return torch.cat(rows)[None]


@pytest.mark.parametrize("kept", [0, 4, 256], ids=["recomputed", "both", "kept"])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
def test_output_and_gradients_equal_the_naive_loop(monkeypatch, kept, heads, groups, layout):
    monkeypatch.setattr(module, "_KEPT", kept)
    torch.manual_seed(0)
    lengths, width = [5, 1, 9, 3], 7

    def tensor(count):
        if layout == "heads first":
            return torch.randn(1, count, 18, width, dtype=torch.float64, requires_grad=True)
        return torch.randn(1, 18, count, width, dtype=torch.float64).transpose(1, 2).requires_grad_()

    given = [tensor(heads), tensor(groups), tensor(groups)]
    ours, theirs = sequence_attention(*given, lengths, 0.3), naive(*given, lengths, 0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(theirs)
    for mine, reference in zip(
        torch.autograd.grad(ours, given, upstream), torch.autograd.grad(theirs, given, upstream), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-12)


def test_in_bfloat16_it_is_as_close_to_float64_as_torchs_own_kernel():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 40, 16).bfloat16().requires_grad_() for heads in (6, 2, 2))
    upstream = torch.randn(1, 40, 6, 16).bfloat16()
    given = [t.detach().double().requires_grad_() for t in (query, key, value)]
    exact = torch.autograd.grad(naive(*given, [40], 0.25), given, upstream.double())
    own = torch.autograd.grad(sequence_attention(query, key, value, [40], 0.25), (query, key, value), upstream)
    torchs = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.25, enable_gqa=True
    )
    theirs = torch.autograd.grad(torchs, (query, key, value), upstream.transpose(1, 2))
    for mine, other, reference in zip(own, theirs, exact, strict=True):
        error, other_error = ((g.double() - reference).norm() / reference.norm() for g in (mine, other))
        assert error < 1.5 * other_error
