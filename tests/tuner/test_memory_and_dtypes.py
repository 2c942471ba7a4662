"""Adapters stay in float32 under a bfloat16 base, whichever way they are made or loaded; low_cpu_mem_usage."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.tuner.tiny_models import KINDS, adapted, build, config, gradients, logits, move, same, tokens

import loraplex

EVERY = pytest.mark.parametrize("adapter", KINDS)


def dtypes(model, name="default"):
    return {p.dtype for key, p in model.named_parameters() if f".{name}." in key and "loraplex_adapters" in key}


def adapter_tensors(model):
    return {key: value for key, value in model.state_dict().items() if "loraplex_adapters" in key}


@EVERY
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16])
def test_adapter_is_float32_under_a_half_precision_base(adapter, base_dtype, tmp_path):
    model = move(get_peft_model(build("llama").to(base_dtype), config(adapter=adapter)), scale=0.3).eval()
    assert dtypes(model) == {torch.float32}
    assert logits(model).dtype is base_dtype
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in file.values()} == {torch.float32}
    for kwargs in ({}, {"low_cpu_mem_usage": True}):
        again = loraplex.load_adapter(build("llama").to(base_dtype), str(tmp_path), **kwargs)
        # not rounded through the dtype of the base on the way
        assert same(adapter_tensors(again), adapter_tensors(model))
        assert torch.equal(logits(again), logits(model))
    model.add_adapter("second", config(adapter="dora"))
    assert dtypes(model, "second") == {torch.float32}


@EVERY
def test_autocast_adapter_dtype_false_gives_the_dtype_of_the_base(adapter, tmp_path):
    base = build("llama").to(torch.bfloat16)
    model = get_peft_model(base, config(adapter=adapter), autocast_adapter_dtype=False)
    assert dtypes(model) == {torch.bfloat16}
    output = logits(move(model))
    assert output.dtype is torch.bfloat16
    assert torch.isfinite(output).all()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.bfloat16}
    model.add_adapter("second", config(adapter=adapter), autocast_adapter_dtype=False)
    assert dtypes(model, "second") == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    for kwargs in ({}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(
            build("llama").to(torch.bfloat16), tmp_path, autocast_adapter_dtype=False, **kwargs
        )
        assert type(again.base_model).__name__ == "LoraModel"
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=2e-2)
        ours = loraplex.load_adapter(
            build("llama").to(torch.bfloat16), str(tmp_path), autocast_adapter_dtype=False, **kwargs
        )
        assert dtypes(ours) == {torch.bfloat16}
        assert torch.equal(logits(ours), logits(model))


@EVERY
def test_double_precision_base_gets_a_double_precision_adapter(adapter):
    model = get_peft_model(build("llama").double(), config(adapter=adapter))
    assert dtypes(model) == {torch.float64}
    assert logits(move(model)).dtype is torch.float64


@EVERY
def test_bfloat16_base_computes_what_the_float32_one_does(adapter):
    """The two differ by the rounding of the frozen model, not more."""
    full = adapted(adapter=adapter)
    half = get_peft_model(build("llama").to(torch.bfloat16), config(adapter=adapter))
    for (_, ours), (_, theirs) in zip(
        sorted(adapter_tensors(half).items()), sorted(adapter_tensors(full).items()), strict=True
    ):
        ours.data.copy_(theirs)
    rounding = (logits(build("llama").to(torch.bfloat16)).float() - logits(build("llama"))).abs().max()
    assert (logits(half.eval()).float() - logits(full)).abs().max() < 6 * rounding


@EVERY
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_low_cpu_memory_loading_is_exact_and_leaves_nothing_on_meta(adapter, beside, tmp_path):
    saved = adapted(adapter=adapter)
    saved.save_pretrained(tmp_path)
    base = adapted(r=2, target_modules=["v_proj"]) if beside else build("llama")
    name = "second" if beside else "default"
    model = loraplex.load_adapter(base, str(tmp_path), name, low_cpu_mem_usage=True, is_trainable=True)
    model.set_adapter(name)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    # assigned tensors lie elsewhere in memory than copied ones: the last bit may differ
    torch.testing.assert_close(logits(model.eval()), logits(saved), rtol=0, atol=1e-6)
    assert {name for name, p in model.named_parameters() if p.requires_grad}
    for value in gradients(model).values():
        assert torch.isfinite(value).all()


@EVERY
def test_low_cpu_memory_loading_of_an_own_type_and_through_peft(adapter, tmp_path):
    saved = adapted(adapter=adapter)
    saved.base_model.close_ranks("default", "model.layers.0.mlp.up_proj", [1])
    saved.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build("llama"), tmp_path, low_cpu_mem_usage=True)
    assert same(model.state_dict(), saved.state_dict())
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), logits(saved), rtol=0, atol=1e-6)


def test_low_cpu_memory_loading_saves_back_to_the_same_folder(tmp_path):
    """Assigned tensors must not be a view of the file that is overwritten."""
    saved = adapted(adapter="dora")
    saved.save_pretrained(tmp_path)
    model = loraplex.load_adapter(build("llama"), str(tmp_path), low_cpu_mem_usage=True, is_trainable=True)
    move(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), expected)
    again = loraplex.load_adapter(build("llama"), str(tmp_path))
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)


@EVERY
def test_a_new_adapter_made_without_memory_is_refused_no_values(adapter):
    """add_adapter(low_cpu_mem_usage=True) leaves meta tensors to be loaded; the model with the old one still works."""
    model = adapted(adapter=adapter)
    expected = logits(model)
    model.add_adapter("second", config(adapter=adapter), low_cpu_mem_usage=True)
    assert {p.device.type for key, p in model.named_parameters() if ".second." in key} == {"meta"}
    assert torch.equal(logits(model), expected)


@EVERY
def test_moving_and_casting_the_whole_model(adapter):
    model = adapted(adapter=adapter)
    expected = logits(model)
    model.double()
    torch.testing.assert_close(logits(model), expected.double(), rtol=0, atol=1e-5)
    model.float()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    model.to(torch.bfloat16)
    assert logits(model).dtype is torch.bfloat16


@EVERY
def test_autocast_to_bfloat16_trains(adapter):
    """The row norm is computed with autocast off: DoRA's start stays the base model's output."""
    model = adapted(adapter=adapter, moved=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        start = logits(model)
        base = logits(build("llama"))
        found = gradients(model)
    torch.testing.assert_close(start, base, rtol=0, atol=1e-2)
    full = gradients(model)
    assert found.keys() == full.keys()
    assert all(value.dtype is torch.float32 and torch.isfinite(value).all() for value in found.values())
    left, right = (torch.cat([g[key].flatten() for key in sorted(g)]) for g in (found, full))
    assert torch.nn.functional.cosine_similarity(left, right, dim=0) > 0.999


def test_batches_of_one_token_and_none():
    """Odd shapes pass through every site: one row, one token, and an empty batch."""
    for adapter in KINDS:
        model = adapted(adapter=adapter)
        assert logits(model, tokens(1, 1)).shape == (1, 1, 64)
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        assert layer(torch.zeros(0, 32)).shape == (0, 48)
        assert layer(torch.zeros(32)).shape == (48,)
        assert layer(torch.zeros(2, 3, 4, 32)).shape == (2, 3, 4, 48)
