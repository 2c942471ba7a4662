"""DoRA's row norm: precise whatever the dtype, and its cached part never outlives the weight it was taken from."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn

from loraplex import AdapterConfig
from loraplex.kernels.magnitude import row_norm, squared_row_norm


def norm_of(weight, a, b):
    return torch.linalg.vector_norm(weight.double() + b.double() @ a.double(), dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_norm_is_float32_precise_also_under_autocast(dtype, autocast):
    torch.manual_seed(0)
    weight = torch.randn(300, 1100).to(dtype)  # more than one block of rows
    a, b = torch.randn(4, 1100) * 0.1, torch.randn(300, 4) * 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        norm = row_norm(weight, a, b, squared_row_norm(weight))
    torch.testing.assert_close(norm.double(), norm_of(weight, a, b), rtol=1e-6, atol=0)


def test_rows_that_cancel_or_are_zero_stay_finite():
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    a, b = torch.tensor([[1.0, 1.0]]), torch.tensor([[-1.0], [0.0]])
    norm = row_norm(weight, a, b, squared_row_norm(weight))
    assert torch.isfinite(norm).all()
    assert (norm > 0).all()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 5)

    def forward(self, x):
        return self.lin(x)


def adapted():
    torch.manual_seed(1)
    model = get_peft_model(
        Net(), AdapterConfig(adapter="dora", r=2, target_modules=["lin"], init_lora_weights=False, seed=0)
    )
    return model, torch.randn(4, 6)


def expected(model, x):
    """The output with nothing cached."""
    return copy.deepcopy(model)(x)


@pytest.mark.parametrize("change", ["in place", "load", "assign", "half and back", "merge and unmerge", "data"])
def test_the_cached_norm_follows_every_change_of_the_weight(change):
    model, x = adapted()
    model(x)  # fills the cache
    base = model.base_model.model.lin.base_layer
    new = torch.randn_like(base.weight)
    if change == "in place":
        with torch.no_grad():
            base.weight.mul_(3)
    elif change == "load":
        base.load_state_dict({"weight": new, "bias": base.bias.detach()})
    elif change == "assign":
        base.load_state_dict({"weight": new, "bias": base.bias.detach()}, assign=True)
    elif change == "half and back":
        model.to(torch.bfloat16).to(torch.float32)
    elif change == "merge and unmerge":
        model.merge_adapter()
        model.unmerge_adapter()
    else:
        base.weight.data = new
    torch.testing.assert_close(model(x), expected(model, x), rtol=1e-6, atol=1e-6)


def test_the_cache_is_neither_saved_nor_pickled():
    model, x = adapted()
    model(x)
    assert not any("square" in key for key in model.state_dict())
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x))
