"""What is installed for whom: a plain adapter changes nothing in torch and transformers; optimizers in optimizers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.allocation.moving import DYNAMIC, MOVING, adapted
from tests.allocation.scenes import batches
from torch import nn

from loraplex import start_allocation

UNTOUCHED = """
import os, sys, warnings
import torch
from torch.optim import optimizer
import transformers.trainer as trainer
from tests.tuner.tiny_models import adapted, tokens

def state():
    hooks = (optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks)
    return (
        list(trainer.DEFAULT_CALLBACKS), [list(kept) for kept in hooks], list(warnings.filters), dict(os.environ),
        [type(finder) for finder in sys.meta_path],
    )

before = state()
model = adapted(adapter=sys.argv[1]).train()
model(input_ids=tokens(), labels=tokens()).loss.backward()
torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).step()
model.eval()
print("untouched" if state() == before else (before, state()))
"""


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_plain_adapter_leaves_torch_and_transformers_as_they_are(adapter: str) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", UNTOUCHED, adapter], capture_output=True, text=True, cwd=root, timeout=300, check=False
    )
    assert done.stdout.strip() == "untouched", done.stdout + done.stderr


class Outer(torch.optim.Optimizer):
    """Steps another optimizer in the middle of its own step, as optimizers that wrap others do."""

    def __init__(self, parameters: list[nn.Parameter], inner: torch.optim.Optimizer) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self.inner = inner

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.inner.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(1.0)


@pytest.mark.parametrize("allocation", [DYNAMIC, MOVING], ids=["hetero", "alora"])
def test_an_optimizer_that_steps_inside_another_loses_nothing(allocation: object) -> None:
    model = adapted(allocation).train()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    half = len(named) // 2
    inner = torch.optim.AdamW([p for _, p in named[:half]], 0.05, weight_decay=0.3)
    outer = Outer([p for _, p in named[half:]], inner)
    controller = start_allocation(model, batches(), total_steps=9)
    layers = [layer.adapter("default").factors for layer in model.base_model.site_layers()]
    seen = 0
    for _ in range(4):
        for batch in batches()[:1]:
            model(**batch).loss.backward()
        before = [(f.gate.clone(), f.lora_A.detach().clone(), f.lora_B.detach().clone()) for f in layers]
        outer.step()
        for factors, (gate, a, b) in zip(layers, before, strict=True):
            closed = gate == 0
            if 0 < int(closed.sum()) < len(gate):
                seen += int(closed.sum())
                assert torch.equal(factors.lora_A[closed], a[closed])
                assert torch.equal(factors.lora_B[:, closed], b[:, closed])
        controller.step()
    assert seen or allocation is DYNAMIC
