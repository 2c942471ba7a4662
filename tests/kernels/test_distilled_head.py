"""The distilled head against logits, softmax and KL written out, values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from loraplex.kernels import distilled_head
from loraplex.kernels.distilled_head import Weights, distilled_log_probs


def by_the_book(teacher, student, weight, bias, labels, weights, scale, softcap):
    def logits(hidden):
        z = scale * (hidden @ weight.T + (0 if bias is None else bias))
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    z_t, z_s = logits(teacher), logits(student)
    log_t, log_s = (-F.cross_entropy(z, labels, reduction="none") for z in (z_t, z_s))
    tau = weights.temperature
    p = torch.softmax(z_t.detach() / tau, 1)
    kl = (p * (p.log() - torch.log_softmax(z_s / tau, 1))).sum(1)
    objective = weights.teacher * log_t + weights.student * log_s - weights.distillation * tau**2 * kl
    q = torch.softmax(z_s, 1)
    return objective, log_t, log_s, tau**2 * kl, -(q * q.log()).sum(1), z_s.argmax(1) == labels


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 1.5)], ids=str)
@pytest.mark.parametrize("at_once", [1 << 24, 80], ids=["whole", "in parts"])
def test_values_and_gradients_equal_the_book(bias, scale, softcap, at_once, monkeypatch):
    monkeypatch.setattr(distilled_head, "LOGITS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    teacher, student = random(7, 5).requires_grad_(), random(7, 5).requires_grad_()
    weight, offset = random(11, 5), random(11) if bias else None
    labels, upstream = torch.randint(11, (7,), generator=generator), random(7)
    rest = (weight, offset, labels, Weights(0.3, 0.6, 0.9, 1.7), scale, softcap)
    ours, theirs = distilled_log_probs(teacher, student, *rest), by_the_book(teacher, student, *rest)
    for name, mine, expected in zip(vars(ours), vars(ours).values(), theirs, strict=True):
        torch.testing.assert_close(mine, expected.detach() if mine.dtype != torch.bool else expected, msg=name)
    wanted = (teacher, student)
    for mine, expected in zip(
        torch.autograd.grad(ours.objective, wanted, upstream),
        torch.autograd.grad(theirs[0], wanted, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


def test_equal_states_do_not_diverge():
    hidden, weight = torch.randn(4, 5, dtype=torch.bfloat16), torch.randn(9, 5, dtype=torch.bfloat16)
    found = distilled_log_probs(
        hidden, hidden.clone(), weight, None, torch.tensor([0, 3, 8, 8]), Weights(0.5, 0.5, 1.0)
    )
    assert torch.equal(found.divergence, torch.zeros(4))
    assert torch.equal(found.teacher, found.student)
    assert found.objective.dtype == torch.float32


def test_nothing_is_rounded_by_autocast():
    generator = torch.Generator().manual_seed(1)
    teacher, weight = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((7, 16), (50, 16)))
    student = (teacher + 0.05 * torch.randn(7, 16, generator=generator)).bfloat16()
    rest = (weight, None, torch.randint(50, (7,), generator=generator), Weights(0.3, 0.6, 0.9))
    plain = distilled_log_probs(teacher, student, *rest)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = distilled_log_probs(teacher, student, *rest)
    for name, value in vars(plain).items():
        assert torch.equal(getattr(mixed, name), value), name
