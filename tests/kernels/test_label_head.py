"""Label log-probabilities against the whole logits matrix in float64."""

import pytest
import torch
from torch.nn import functional as F

from loraplex.kernels import label_head
from loraplex.kernels.label_head import label_log_probs


def naive(hidden, weight, bias, labels, scale, softcap):
    z = scale * F.linear(hidden, weight, bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = z.log_softmax(-1)
    return log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1), z.argmax(-1) == labels


@pytest.mark.parametrize("at_once", [1, 60, 1 << 24], ids=["one", "three", "all"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradient_equal_the_whole_matrix(monkeypatch, at_once, softcap, scale, with_bias):
    monkeypatch.setattr(label_head, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, 5, dtype=torch.float64)
    bias = torch.randn(20, dtype=torch.float64) if with_bias else None
    labels = torch.randint(0, 20, (7,))
    ours = label_log_probs(hidden, weight, bias, labels, scale, softcap)
    theirs = naive(hidden, weight, bias, labels, scale, softcap)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(7, dtype=torch.float64)
    (mine,) = torch.autograd.grad(ours[0], hidden, upstream)
    (reference,) = torch.autograd.grad(theirs[0], hidden, upstream)
    torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-12)


def test_no_label_at_all_gives_a_differentiable_zero():
    hidden = torch.randn(0, 5, requires_grad=True)
    log_probs, _, _ = label_log_probs(hidden, torch.randn(20, 5), None, torch.empty(0, dtype=torch.long))
    log_probs.sum().backward()
    assert hidden.grad.shape == (0, 5)


def test_nothing_is_rounded_by_autocast():
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((7, 16), (50, 16)))
    labels = torch.randint(50, (7,), generator=generator)
    plain = label_head.label_log_probs(hidden, weight, None, labels)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = label_head.label_log_probs(hidden, weight, None, labels)
    assert all(torch.equal(*pair) for pair in zip(mixed, plain, strict=True))
