"""LoRA-XS: what its file holds, bases found again and cached, and the wrong base refused."""

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from tests.adapters.large_shapes import ALL, count
from tests.tuner.tiny_models import adapted, build, config, logits, move, same, trainable

import loraplex
from loraplex import UserError
from loraplex.adapters import bases
from loraplex.adapters.contracts import SiteInit
from loraplex.adapters.xs import LoRAXS

WEIGHTS = "adapter_model.safetensors"


def factors(weight, rank=4, **options):
    site = SiteInit("layers.0.site", weight.shape[1], weight.shape[0], rank, 8.0, 3, lambda: weight)
    return LoRAXS(**options).build(site)


@pytest.mark.parametrize(("r", "expected"), [(16, 57_344), (32, 229_376), (64, 917_504)])
def test_counts_on_llama_2_7b(r, expected):
    assert count("lora-xs", r, ALL) == expected


def test_only_the_square_matrices_train():
    model = adapted(adapter="lora-xs", r=4)
    assert {p.shape for p in trainable(model)} == {(4, 4)}
    assert sum(p.numel() for p in trainable(model)) == 14 * 16


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "randomized"])
def test_the_bases_are_the_leading_singular_vectors(exact):
    torch.manual_seed(0)
    weight = torch.randn(30, 20)
    a, b = (part.detach() for part in (factors(weight, exact_svd=exact).frozen_A, factors(weight).frozen_B))
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(b @ a, u[:, :4] @ s[:4].diag() @ vh[:4], rtol=0, atol=1e-4)
    torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=1e-5)


def test_the_file_holds_the_matrix_a_hash_and_a_fingerprint(tmp_path):
    adapted(adapter="lora-xs", r=16).save_pretrained(tmp_path)
    file = load_file(tmp_path / WEIGHTS)
    names = {key.rpartition(".")[2] for key in file}
    assert names == {"lora_R", "base_digest", "fingerprint"}
    size = sum(value.numel() * value.element_size() for value in file.values())
    assert size <= 1.05 * 4 * 14 * 16 * 16


def test_stored_bases_need_no_comparison(tmp_path):
    model = adapted(adapter={"name": "lora-xs", "store_bases": True})
    model.save_pretrained(tmp_path)
    for kwargs in ({}, {"low_cpu_mem_usage": True}):
        base = build("llama")
        with torch.no_grad():
            for parameter in base.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        again = loraplex.load_adapter(base, str(tmp_path), **kwargs)
        ours = {key: value for key, value in model.state_dict().items() if "loraplex" in key}
        assert same({key: again.state_dict()[key] for key in ours}, ours)


@pytest.mark.parametrize("kwargs", [{}, {"low_cpu_mem_usage": True}], ids=["copied", "assigned"])
def test_loads_on_its_own_base_and_refuses_another(tmp_path, kwargs):
    model = adapted(adapter="lora-xs")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loraplex.load_adapter(build("llama"), str(tmp_path), **kwargs)), logits(model))
    base = build("llama")
    torch.manual_seed(2)
    with torch.no_grad():
        weight = base.model.layers[1].mlp.up_proj.weight
        weight += 0.01 * weight.std() * torch.randn_like(weight)
    before = logits(base)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj: this base model has other weights.*store_bases"):
        loraplex.load_adapter(base, str(tmp_path), **kwargs)
    assert torch.equal(logits(base), before)


def test_bases_from_another_decomposition_are_refused_as_such(tmp_path):
    adapted(adapter="lora-xs").save_pretrained(tmp_path)
    file = load_file(tmp_path / WEIGHTS)
    key = next(key for key in file if key.endswith("fingerprint"))
    changed = {name: value.clone() for name, value in file.items()}
    changed[key] = -changed[key]
    save_file(changed, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match="the same base weights gave another subspace here"):
        loraplex.load_adapter(build("llama"), str(tmp_path))


def test_an_adapter_added_beside_a_merged_one_sees_the_frozen_weight():
    model = adapted()
    model.merge_adapter()
    model.add_adapter("xs", config(adapter="lora-xs"))
    alone = adapted(adapter="lora-xs", name="xs")
    ours = {key: value for key, value in model.state_dict().items() if ".xs." in key and "fingerprint" in key}
    assert same(ours, {key: value for key, value in alone.state_dict().items() if "fingerprint" in key})


def test_large_weights_are_decomposed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path))
    torch.manual_seed(0)
    weight = torch.randn(520, 510)
    first = factors(weight)
    (file,) = (tmp_path / bases._FOLDER).iterdir()

    def never(*args, **kwargs):
        raise AssertionError

    with monkeypatch.context() as patched:
        patched.setattr(bases, "truncated_svd", never)
        assert same(factors(weight).state_dict(), first.state_dict())
        assert torch.equal(factors(weight).frozen_A, first.frozen_A)
        with pytest.raises(AssertionError):
            factors(weight + 1e-3)
        with pytest.raises(AssertionError):
            factors(weight, exact_svd=True)
    file.write_bytes(b"broken")
    assert torch.equal(factors(weight).frozen_A, first.frozen_A)
    assert file.stat().st_size > 1000


def test_a_path_that_does_not_check_the_base_is_refused():
    with pytest.raises(UserError, match="needs a PeftModel, because its file must be compared"):
        inject_adapter_in_model(config(adapter="lora-xs"), build("llama"))


@pytest.mark.usefixtures("native_adapters")
def test_transformers_own_path_does_not_check_the_base_and_is_refused():
    with pytest.raises(UserError, match="needs a PeftModel, because its file must be compared"):
        build("llama").add_adapter(config(adapter="lora-xs"))


def test_ranks_above_the_number_of_singular_vectors_are_refused():
    with pytest.raises(UserError, match=r"rank of .*k_proj is 20, but this site allows at most 16"):
        get_peft_model(build("llama"), config(adapter="lora-xs", r=20))


def test_bases_keep_their_type_under_half_precision(tmp_path):
    model = move(get_peft_model(build("llama").to(torch.bfloat16), config(adapter="lora-xs"))).eval()
    layer = next(m for m in model.modules() if hasattr(m, "frozen_A"))
    assert layer.frozen_A.dtype is torch.float32
    model.save_pretrained(tmp_path)
    again = loraplex.load_adapter(build("llama").to(torch.bfloat16), str(tmp_path))
    assert torch.equal(logits(again), logits(model))
