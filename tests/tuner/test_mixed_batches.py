"""`adapter_names`: every row of a batch has its own adapter; also through generation with beams."""

import pytest
import torch
from tests.tuner.tiny_models import adapted, build, config, logits, move, tokens

from loraplex import UserError

NAMES = ["default", "__base__", "other", "default", "other"]


def mixed(architecture="llama", **fields):
    model = adapted(architecture, **fields)
    model.add_adapter("other", config(architecture, adapter="dora", r=2, **fields))
    model.set_adapter("other")
    move(model, seed=6, scale=0.3)
    model.set_adapter("default")
    return model.eval()


def alone(model, name, **inputs):
    """What the model computes with one adapter for all rows."""
    if name == "__base__":
        with model.disable_adapter():
            return logits(model, **inputs)
    active = model.active_adapters[0]
    model.set_adapter(name)
    found = logits(model, **inputs)
    model.set_adapter(active)
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_every_row_equals_its_own_adapter_alone(architecture):
    model, ids = mixed(architecture), tokens(5)
    found = logits(model, ids, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        expected = alone(model, name, input_ids=ids)[row]
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-6)
    assert (found[0] - alone(model, "other", input_ids=ids)[0]).abs().max() > 1e-2


def test_only_some_sites_have_both():
    model = adapted(target_modules=["q_proj", "up_proj"])
    model.add_adapter("other", config(adapter="dora", target_modules=["v_proj", "up_proj"]))
    model.set_adapter("other")
    move(model, seed=6)
    ids = tokens(5)
    found = logits(model.eval(), ids, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(found[row], alone(model, name, input_ids=ids)[row], rtol=0, atol=1e-6)


def test_modules_to_save_and_closed_ranks_take_part():
    model = mixed(modules_to_save=["lm_head"], target_modules=["q_proj", "up_proj"])
    model.base_model.close_ranks("default", "model.layers.0.mlp.up_proj", [0, 1, 2, 3])
    ids = tokens(5)
    found = logits(model, ids, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(found[row], alone(model, name, input_ids=ids)[row], rtol=0, atol=1e-6)


def test_the_active_adapter_and_hooks_are_as_before():
    model, ids = mixed(), tokens(5)
    expected = logits(model, ids)
    logits(model, ids, adapter_names=NAMES)
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, ids), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "up_proj"]}])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generation_row_by_row(settings, fields):
    model, ids = mixed(**fields), tokens(3, 5)
    names = ["other", "__base__", "default"]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **settings}
    found = model.generate(input_ids=ids, adapter_names=names, **settings)
    per_row = settings.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(input_ids=ids[row : row + 1], **settings)
        else:
            model.set_adapter(name)
            expected = model.generate(input_ids=ids[row : row + 1], **settings)
        assert torch.equal(found[row * per_row : (row + 1) * per_row], expected), name


def test_refused():
    model, ids = mixed(), tokens(5)
    with pytest.raises(UserError, match=r"non-existing adapter\(s\): nobody"):
        logits(model, ids, adapter_names=["default"] * 4 + ["nobody"])
    for wrong in (["default"] * 4, ["default"] * 6, ["default"], []):
        with pytest.raises(UserError, match=rf"number of inputs, but got {len(wrong)} and 5 respectively"):
            logits(model, ids, adapter_names=wrong)
        with pytest.raises(UserError, match=rf"number of inputs, but got {len(wrong)} and 10 respectively"):
            model.generate(input_ids=ids, num_beams=2, adapter_names=wrong, max_new_tokens=2)
    # a whole multiple is a mistake too where nothing repeats the rows
    with pytest.raises(UserError, match="number of inputs, but got 1 and 2 respectively"):
        logits(model, tokens(2), adapter_names=["default"])
    model.train()
    with pytest.raises(UserError, match="training mode"):
        logits(model, ids, adapter_names=NAMES)
    model.eval()
    model.merge_adapter()
    with pytest.raises(UserError, match="merged adapters"):
        logits(model, ids, adapter_names=NAMES)
    model.unmerge_adapter()
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(
        logits(model, ids, adapter_names=["__base__"] * 5), logits(build("llama"), ids), rtol=0, atol=0
    )
