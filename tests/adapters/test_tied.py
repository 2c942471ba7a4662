"""Tied-LoRA: counts on real shapes, one owner of every shared tensor, and the paths that would lose it."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from tests.adapters.large_shapes import count
from tests.tuner.tiny_models import adapted, build, config, gradients, logits, move, same, trainable

import loraplex
from loraplex import UserError
from loraplex.adapters.tied import TiedLoRA

QKV = ["q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ("tied-tl5", 131_072),
        ("tied-tl6", 524_544),
        ("lora", 6_291_456),
        # A and u shared by q, k and v within a layer: LoRA on the fused projection
        ({"name": "tied-tl5", "tie_A": False, "tie_B": False}, 4_194_304),
        ({"name": "tied-tl6", "train_A": False, "train_B": False}, 32 * (8 + 3 * 4096)),
        ({"name": "tied-tl6", "fused": []}, 6 * 4096 * 8 + 32 * 3 * (8 + 4096)),
    ],
    ids=str,
)
def test_counts_on_llama_2_7b(adapter, expected):
    assert count(adapter, 8, QKV) == expected


def test_counts_under_grouped_queries():
    """r·(d + d + 2·d_kv) + L·(r + d + 2·d_kv)."""
    assert count("tied-tl6", 8, QKV, num_key_value_heads=8) == 8 * (4096 + 4096 + 2048) + 32 * (8 + 4096 + 2048)


@pytest.mark.parametrize("targets", [QKV, ["down_proj"], "all-linear"], ids=str)
def test_every_tensor_is_registered_once(targets, tmp_path):
    model = adapted(adapter="tied-tl6", target_modules=targets)
    named = [name for name, _ in model.named_parameters(remove_duplicate=False) if "loraplex" in name]
    assert len(named) == len({id(model.get_parameter(name)) for name in named})
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in file.values()) == sum(p.numel() for p in trainable(model))


def test_what_ties_and_what_does_not():
    model = adapted(adapter="tied-tl6")
    first, second = (model.get_submodule(f"base_model.model.model.layers.{i}.self_attn") for i in (0, 1))
    q, k, other = (m.loraplex_adapters["default"].factors for m in (first.q_proj, first.k_proj, second.q_proj))
    assert q.shared_A is k.shared_A is other.shared_A
    assert q.shared_B is other.shared_B
    assert q.shared_B is not k.shared_B
    assert q.shared_u is k.shared_u
    assert q.shared_u is not other.shared_u
    assert q.lora_v is not other.lora_v
    assert first.o_proj.loraplex_adapters["default"].factors.shared_A is not q.shared_A


def test_one_layer_equals_lora():
    """With L = 1 and separate kinds, without vectors: a pair per site."""
    tied = adapted(adapter={"name": "tied-tl5", "fused": []}, layers_to_transform=0, moved=False, target_modules=QKV)
    lora = adapted(layers_to_transform=0, target_modules=QKV)
    for module in lora.modules():
        if hasattr(module, "loraplex_adapters"):
            factors = tied.get_submodule(f"base_model.model.{module.site}").loraplex_adapters["default"].factors
            theirs = module.loraplex_adapters["default"].factors
            factors.shared_A.lora_A.data.copy_(theirs.lora_A)
            factors.shared_B.lora_B.data.copy_(theirs.lora_B)
    assert torch.equal(logits(tied), logits(lora))


def test_gradients_of_a_tied_tensor_add_up_over_its_sites():
    tied = adapted(adapter={"name": "tied-tl5", "fused": []}, target_modules=["o_proj"])
    free = adapted(adapter={"name": "tied-tl5", "fused": [], "tie_A": False, "tie_B": False}, target_modules=["o_proj"])
    (a,) = (p for key, p in tied.named_parameters() if key.endswith("lora_A"))
    (b,) = (p for key, p in tied.named_parameters() if key.endswith("lora_B"))
    for key, parameter in free.named_parameters():
        if "loraplex" in key:
            parameter.data.copy_(a if key.endswith("lora_A") else b)
    whole, parts = gradients(tied), gradients(free)
    for name in ("lora_A", "lora_B"):
        (one,) = (gradient for key, gradient in whole.items() if key.endswith(name))
        several = [gradient for key, gradient in parts.items() if key.endswith(name)]
        assert len(several) == 2
        torch.testing.assert_close(one, sum(several), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("adapter", ["tied-tl5", "tied-tl6", {"name": "tied-tl6", "train_A": False, "train_B": False}])
@pytest.mark.parametrize("kwargs", [{}, {"low_cpu_mem_usage": True}], ids=["copied", "assigned"])
def test_saved_and_loaded(adapter, kwargs, tmp_path):
    model = adapted(adapter=adapter)
    model.save_pretrained(tmp_path)
    again = loraplex.load_adapter(build("llama"), str(tmp_path), is_trainable=True, **kwargs).eval()
    assert same(again.state_dict(), model.state_dict())
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    assert not any(tensor.is_meta for tensor in again.state_dict().values())
    frozen = loraplex.load_adapter(build("llama"), str(tmp_path), **kwargs)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_several_adapters_switch_save_and_delete(tmp_path):
    model = adapted(adapter="tied-tl6")
    model.add_adapter("second", config(adapter="tied-tl5", r=2, seed=9))
    expected = logits(model)
    assert all(".default." in key for key, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("second")
    assert all(".second." in key for key, p in model.named_parameters() if p.requires_grad)
    other = logits(move(model, seed=8))
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    for name, folder, result in (("default", tmp_path, expected), ("second", tmp_path / "second", other)):
        assert torch.equal(logits(loraplex.load_adapter(build("llama"), str(folder), name)), result)
    both = loraplex.load_adapter(build("llama"), str(tmp_path))
    loraplex.load_adapter(both, str(tmp_path / "second"), "second")
    both.set_adapter("second")
    assert torch.equal(logits(both), other)
    model.delete_adapter("second")
    assert torch.equal(logits(model), expected)
    assert not any("second" in key.split(".") for key in model.state_dict())
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build("llama")))


def test_loading_beside_leaves_the_active_one_training(tmp_path):
    adapted(adapter="tied-tl6").save_pretrained(tmp_path)
    model = adapted(adapter="tied-tl5")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    loraplex.load_adapter(model, str(tmp_path), "second")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names


def test_copies_and_pickles_keep_their_ties():
    model = adapted(adapter="tied-tl6")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        move(again, seed=7)
        assert not torch.equal(logits(again), logits(model))
        layers = [m.loraplex_adapters["default"].factors for m in again.modules() if hasattr(m, "loraplex_adapters")]
        owned = {id(module) for module in again.base_model.loraplex_shared.modules()}
        assert all(id(module) in owned for factors in layers for module in factors.borrowed())


def test_injection_that_would_lose_the_owner_is_refused():
    with pytest.raises(UserError, match="needs a PeftModel, because the tensors that its sites share"):
        inject_adapter_in_model(config(adapter="tied-tl6"), build("llama"))


@pytest.mark.usefixtures("native_adapters")
def test_transformers_own_injection_would_lose_the_owner_too():
    with pytest.raises(UserError, match="needs a PeftModel, because the tensors that its sites share"):
        build("llama").add_adapter(config(adapter="tied-tl6"))


def test_a_failed_injection_leaves_no_shared_tensor():
    model = adapted(adapter="tied-tl5")
    before = set(model.state_dict())
    with pytest.raises(UserError):
        model.add_adapter("second", config(adapter="tied-tl6", rank_pattern={"mlp.up_proj": 400}))
    assert set(model.state_dict()) == before


def test_names_of_shared_tensors_are_no_adapter_names():
    model = adapted(adapter="tied-tl6")
    for name in ("lora_u", "loraplex_shared"):
        with pytest.raises(UserError, match="choose another"):
            model.add_adapter(name, config())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_of_shared_tensors(dtype):
    model = get_peft_model(build("llama").to(dtype), config(adapter="tied-tl6"))
    wanted = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in trainable(model)} == {wanted}
    plain = get_peft_model(build("llama").to(dtype), config(adapter="tied-tl6"), autocast_adapter_dtype=False)
    assert {p.dtype for p in trainable(plain)} == {dtype}
    assert torch.isfinite(logits(move(plain))).all()


def test_peft_loads_it_too(tmp_path):
    model = adapted(adapter="tied-tl6")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path).eval()), logits(model))


@pytest.mark.parametrize("flags", range(1, 16))
def test_every_mask_starts_as_the_identity_and_can_move(flags):
    names = ("train_A", "train_B", "train_u", "train_v")
    options = TiedLoRA(**{name: bool(flags >> i & 1) for i, name in enumerate(names)})
    model = adapted(adapter=options, moved=False)
    assert torch.equal(logits(model), logits(build("llama")))
    found = gradients(model)
    assert any(gradient.any() for gradient in found.values())


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="nothing to train"):
        TiedLoRA(train_A=False, train_B=False, train_u=False, train_v=False)
