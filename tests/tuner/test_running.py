"""The ways a model is run: gradient checkpointing, generation with a cache, torch.compile, copies and pickles."""

import copy
import io
import pickle

import pytest
import torch
from peft import get_peft_model
from tests.tuner.tiny_models import KINDS, adapted, config, gradients, llama, logits, move, same, tokens, trainable
from torch._dynamo.testing import CompileCounter

from loraplex.tuner.layer import SiteLayer

EVERY = pytest.mark.parametrize("adapter", KINDS)
# and one that has no ΔW
ROUTED_TOO = pytest.mark.parametrize("adapter", [*KINDS, "hydra"])


@ROUTED_TOO
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(architecture, adapter, reentrant, dropout):
    model = adapted(architecture, adapter=adapter, lora_dropout=dropout).train()
    for module in model.modules():
        # the base's own dropout off: GPT-2 has some
        if isinstance(module, torch.nn.Dropout) and module.p != dropout:
            module.p = 0.0
    torch.manual_seed(0)
    plain = gradients(model, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(0)
    checkpointed = gradients(model, use_cache=False)
    assert plain.keys() == checkpointed.keys()
    assert same(checkpointed, plain)
    assert len(plain) == sum(1 for _ in trainable(model))


@ROUTED_TOO
def test_reentrant_checkpointing_without_a_first_gradient_is_not_silent(adapter):
    """With inputs that need no gradient reentrant checkpointing would cut the adapters off: PEFT prevents it."""
    model = adapted(adapter=adapter).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert all(gradient.abs().sum() > 0 for key, gradient in gradients(model).items() if "lora_B" in key)


@ROUTED_TOO
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_generation_with_a_cache_equals_the_full_forward(architecture, adapter):
    model, ids = adapted(architecture, adapter=adapter), tokens(2, 5)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(input_ids=ids, **settings)
    expected = ids
    for _ in range(8):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **settings), expected)


@ROUTED_TOO
def test_compiled_model_is_one_graph_and_flipping_a_gate_does_not_compile_again(adapter):
    model = adapted(adapter=adapter)
    layer = model.base_model.model.model.layers[0]
    counter = CompileCounter()
    compiled = torch.compile(layer.mlp, backend=counter, fullgraph=True)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer.mlp(x), rtol=0, atol=1e-6)
    assert counter.frame_count == 1
    before = layer.mlp(x)
    for ranks in ([0], [1, 2], [3]):
        model.base_model.close_ranks("default", "model.layers.0.mlp.up_proj", ranks)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer.mlp(x), rtol=0, atol=1e-6)
    assert not torch.allclose(compiled(x), before, atol=1e-3)
    # one more for the calls with gradients
    assert counter.frame_count == 2


@ROUTED_TOO
def test_compiled_training_step_has_the_same_gradients(adapter):
    model = move(get_peft_model(llama(num_hidden_layers=1), config(adapter=adapter))).train()
    expected = gradients(model)
    model.base_model.forward = torch.compile(model.base_model.forward, backend="eager", fullgraph=True)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)


@ROUTED_TOO
def test_training_after_a_look_in_inference_mode(adapter):
    """Nothing that is kept between calls may be an inference tensor."""
    looked_at, fresh = adapted(adapter=adapter), adapted(adapter=adapter)
    with torch.inference_mode():
        looked_at(input_ids=tokens())
    assert same(gradients(looked_at.train()), gradients(fresh.train()))


@EVERY
def test_copies_are_independent_and_equal(adapter):
    model = adapted(adapter=adapter)
    model.add_adapter("other", config(adapter="dora"))
    model.base_model.close_ranks("default", "model.layers.0.mlp.up_proj", [1])
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    move(twin)
    twin.base_model.close_ranks("default", "model.layers.1.mlp.up_proj", [0])
    assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)
    twin.merge_adapter()
    assert torch.equal(logits(model), expected)
    # the copy's layers read the copy's frozen weights
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    layer = twin.base_model.model.model.layers[0].mlp.up_proj
    assert layer.frozen.parameter() is layer.base_layer.weight


@EVERY
@pytest.mark.parametrize("merged", [False, True])
def test_pickled_model_is_the_same(adapter, merged):
    model = adapted(adapter=adapter)
    expected = logits(model)
    if merged:
        model.merge_adapter()
    for again in (pickle.loads(pickle.dumps(model)), _through_torch_save(model)):
        assert same(again.state_dict(), model.state_dict())
        assert torch.equal(logits(again), logits(model))
        if merged:
            again.unmerge_adapter()
        assert torch.equal(logits(again), expected)


def _through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@ROUTED_TOO
def test_dropout_acts_in_training_only(adapter):
    model = adapted(adapter=adapter, lora_dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model), logits(adapted(adapter=adapter)))
    model.train()
    torch.manual_seed(0)
    first = logits(model)
    assert not torch.equal(first, logits(model))
    torch.manual_seed(0)
    assert torch.equal(first, logits(model))


@ROUTED_TOO
def test_state_dict_of_the_whole_model_reloads(adapter):
    model = adapted(adapter=adapter)
    twin = adapted(adapter=adapter, moved=False)
    assert not torch.equal(logits(twin), logits(model))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model))


@EVERY
def test_replacing_the_frozen_module_is_seen(adapter):
    """Quantizing or sharding puts another module where the frozen one was."""
    model = adapted(adapter=adapter)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    new = torch.nn.Linear(32, 48, bias=True)
    layer.base_layer = new
    assert not layer.frozen.transposed
    x = torch.randn(3, 32)
    with torch.no_grad():
        change = layer.get_delta_weight("default")
        torch.testing.assert_close(layer(x), new(x) + x @ change.T, rtol=0, atol=1e-5)


@ROUTED_TOO
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_reference_path_and_fast_path_agree(adapter, architecture):
    """Hooks, shards and quantized weights take the reference path; the fast one computes the same."""
    model = adapted(architecture, adapter=adapter)
    layers = [module for module in model.modules() if isinstance(module, SiteLayer)]
    assert all(layer.frozen.is_dense() for layer in layers)
    fast, expected = logits(model), gradients(model)
    handles = [layer.base_layer.register_forward_hook(lambda *_: None) for layer in layers]
    assert not any(layer.frozen.is_dense() for layer in layers)
    torch.testing.assert_close(logits(model), fast, rtol=0, atol=1e-6)
    for key, value in gradients(model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-7, msg=key)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model), fast)
