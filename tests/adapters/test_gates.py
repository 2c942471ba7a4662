"""What is recorded of gates: means over any number of calls, and nothing unless asked."""

import math

import pytest
import torch
from tests.contract.sites import build

from loraplex import Adapter
from loraplex.adapters.gates import GateRecord
from loraplex.adapters.hydra import Heads, Route


def test_means_over_calls_of_different_sizes():
    torch.manual_seed(0)
    gates = torch.randn(17, 3).softmax(-1)
    record = GateRecord(3)
    assert record.read() is None
    record.add(gates[:5].view(1, 5, 3))
    with torch.inference_mode():
        record.add(gates[5:])
    found = record.read()
    assert found.tokens == 17
    assert found.load == pytest.approx(gates.mean(0).tolist(), rel=1e-6)
    entropy = -(gates * gates.log()).sum(-1).mean() / math.log(3)
    assert found.entropy == pytest.approx(float(entropy), rel=1e-6)
    record.clear()
    assert record.read() is None


def test_the_ends_of_the_scale():
    record = GateRecord(4)
    record.add(torch.full((2, 4), 0.25))
    assert record.read().entropy == pytest.approx(1)
    assert record.read().dead == 0
    record.clear()
    record.add(torch.tensor([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0]]))
    # loads .95, .05, 0, 0: a tenth of an even quarter is .025
    assert record.read().dead == 0.5
    assert record.read().entropy < 0.2


@pytest.mark.parametrize("path", ["forward", "sum_of_deltas"])
def test_a_site_records_when_it_is_asked_to(path):
    site = build(Adapter(Heads(heads=3), Route()), 7, 5, 2)
    x = torch.randn(6, 7, dtype=torch.float64)
    getattr(site, path)(x)
    assert site.adapter.combine.gates.read() is None
    site.adapter.combine.gates.on = True
    getattr(site, path)(x)
    expected = (x @ site.adapter.combine.lora_route.T).softmax(-1).mean(0)
    assert site.adapter.combine.gates.read().load == pytest.approx(expected.tolist(), rel=1e-6)
