"""A damaged or foreign adapter folder stops with one line, and the model is as it was."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.tuner.tiny_models import adapted, bert, build, frozen_copy, llama, logits, same

import loraplex
from loraplex import UserError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One whole folder in LoRA's naming, one in our own."""
    root = tmp_path_factory.mktemp("adapters")
    model = adapted(adapter="dora")
    model.save_pretrained(root / "lora")
    model.base_model.close_ranks("default", "model.layers.1.mlp.up_proj", [2])
    model.save_pretrained(root / "own")
    return root


@pytest.fixture
def folder(folders, tmp_path):
    return shutil.copytree(folders / "lora", tmp_path / "adapter")


@pytest.fixture
def own(folders, tmp_path):
    return shutil.copytree(folders / "own", tmp_path / "own")


def change_weights(folder, change):
    # copied out of the file, which is about to be written
    tensors = {key: value.clone() for key, value in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder, **values):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(folder, expected, base=None, **kwargs):
    """Loading into a base model and beside an adapter both fail with this line and leave no trace."""
    other, base = base, build("llama") if base is None else base
    before, trained = frozen_copy(base), [p.requires_grad for p in base.parameters()]
    with pytest.raises(UserError, match=expected) as caught:
        loraplex.load_adapter(base, str(folder), **kwargs)
    assert "\n" not in str(caught.value)
    assert same(base.state_dict(), before)
    assert [p.requires_grad for p in base.parameters()] == trained
    assert not hasattr(base, "peft_config")
    if other is not None:
        return
    # two names only, so that a half-loaded adapter would leave new layers behind
    model = adapted(target_modules=["k_proj", "gate_proj"])
    before, output = frozen_copy(model), logits(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(UserError, match=expected):
        loraplex.load_adapter(model, str(folder), "second", **kwargs)
    assert same(model.state_dict(), before)
    assert torch.equal(logits(model), output)
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


def test_missing_tensor(folder):
    change_weights(folder, lambda tensors: tensors.pop(KEY))
    refused(folder, r"lacks 1 of \d+ tensors, the first is .*layers\.0\.self_attn\.q_proj")


def test_unexpected_tensor(folder):
    change_weights(folder, lambda tensors: tensors.update({KEY.replace("layers.0", "layers.7"): tensors[KEY].clone()}))
    refused(folder, r"holds '.*layers\.7\.self_attn\.q_proj.*', which this model and config do not have")


def test_missing_and_unexpected_tensor_in_our_own_naming(own):
    def drop(tensors):
        key = next(key for key in tensors if key.endswith("lora_magnitude_vector"))
        tensors.pop(key)

    whole = {key: value.clone() for key, value in load_file(own / WEIGHTS).items()}
    change_weights(own, drop)
    refused(own, "lacks 1 of .*lora_magnitude_vector")
    save_file({**whole, "base_model.model.foreign.weight": torch.ones(2)}, own / WEIGHTS)
    refused(own, "holds 'base_model.model.foreign.weight', which this model and config do not have")


def test_other_shape_names_the_tensor_and_the_cause(folder):
    change_weights(folder, lambda tensors: tensors.update({KEY: torch.zeros(4, 31)}))
    refused(folder, r"q_proj.*is \(4, 31\) in the file and \(4, 32\) in the model: .*another base model")


def test_wrong_base_model(folder):
    wide = llama(hidden_size=64)
    refused(folder, "in the file and .* in the model: the adapter belongs to another base model", base=wide)
    shallow = llama(num_hidden_layers=1)
    refused(folder, r"holds '.*layers\.1\.", base=shallow)
    refused(folder, "not found in the base model|match no linear module", base=bert())
    # targets by kind, so that a deeper model has more of them
    adapted(target_modules=["q_proj", "v_proj"]).save_pretrained(folder)
    refused(folder, r"lacks 4 of \d+ tensors", base=llama(num_hidden_layers=3))


def test_truncated_file(folder):
    data = (folder / WEIGHTS).read_bytes()
    for size in (len(data) // 2, 40, 3, 0):
        (folder / WEIGHTS).write_bytes(data[:size])
        refused(folder, "adapter_model.safetensors is truncated or not a safetensors file")


def test_file_of_another_kind(folder):
    torch.save({KEY: torch.zeros(4, 32)}, folder / WEIGHTS)
    refused(folder, "truncated or not a safetensors file")


def test_pickles_are_not_opened(folder):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"never read")
    refused(folder, "has adapter_model.bin, a pickle")


def test_missing_files(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    refused(folder, "lacks adapter_model.safetensors")
    (folder / CONFIG).unlink()
    refused(folder, "holds no adapter: adapter_config.json is missing")
    refused(tmp_path / "nowhere", "no adapter folder or hub id '.*nowhere': no such folder, and a hub id is")
    (tmp_path / "adapter.txt").touch()
    refused(tmp_path / "adapter.txt", "adapter.txt' is a file: give the folder that holds adapter_config.json")
    refused("someone/not-in-the-cache", "no adapter folder or hub id 'someone/not-in-the-cache'")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(folder, value):
    change_weights(folder, lambda tensors: tensors[KEY].view(-1)[5:6].fill_(value))
    refused(folder, r"layers\.0\.self_attn\.q_proj.*NaN or infinity: pass allow_nonfinite=True")
    model = loraplex.load_adapter(build("llama"), str(folder), allow_nonfinite=True)
    assert not torch.isfinite(logits(model)).all()


def test_config_that_is_not_valid(folder, own):
    change_config(own, rankk=3)
    refused(own, "unknown key 'rankk'")
    change_config(folder, use_quantum=True)
    refused(folder, "unknown key 'use_quantum'")
    for values, expected in [
        ({"use_quantum": None, "r": "8"}, "rank of the adapter .* is '8'"),
        ({"r": 0}, "rank of the adapter .* is 0|r. should be"),
        ({"r": 10**9}, r"rank of model\.layers\.0\.\S+ is 1000000000, but this site allows at most 48|at most"),
        ({"r": 4, "lora_alpha": "much"}, "alpha"),
        ({"lora_alpha": 6, "target_modules": 7}, "target_modules is 7: give a list of module names"),
        ({"target_modules": "(q_proj"}, r"target_modules: '\(q_proj' is not a regular expression"),
    ]:
        change_config(folder, **values)
        refused(folder, expected)
    (folder / CONFIG).write_text("{not json")
    refused(folder, "adapter_config.json: not JSON")
    (folder / CONFIG).write_text("[1, 2]")
    refused(folder, "is a None adapter")
    (folder / CONFIG).write_text('{"peft_type": "NO_SUCH"}')
    refused(folder, "is a NO_SUCH adapter")


def test_keys_that_a_later_peft_left_off_do_not_matter(folder):
    change_config(folder, use_something_new=False, something_else=None)
    loraplex.load_adapter(build("llama"), str(folder))


def test_missing_module_to_save_bias_and_token(tmp_path):
    cases = {
        "head": ({"modules_to_save": ["lm_head"]}, "base_model.model.lm_head.weight", "lm_head"),
        "tokens": ({"trainable_token_indices": [1, 2]}, None, "embed_tokens"),
    }
    for name, (fields, key, named) in cases.items():
        adapted(target_modules=["q_proj"], **fields).save_pretrained(tmp_path / name)
        key = key or next(key for key in load_file(tmp_path / name / WEIGHTS) if "embed_tokens" in key)
        change_weights(tmp_path / name, lambda tensors, key=key: tensors.pop(key))
        refused(tmp_path / name, f"lacks a tensor: .*{named}")
    for bias in ("lora_only", "all"):
        adapted("qwen2", bias=bias, target_modules=["q_proj"]).save_pretrained(tmp_path / bias)
        change_weights(tmp_path / bias, lambda tensors: tensors.pop(next(k for k in tensors if k.endswith("bias"))))
        refused(tmp_path / bias, "lacks 1 of .*bias", base=build("qwen2"))


def test_peft_loader_is_as_strict_about_tensors(folder):
    """`PeftModel.load_adapter`, which Trainer uses to resume, passes the same checks."""
    model = adapted(adapter="dora")
    change_weights(folder, lambda tensors: tensors.pop(KEY))
    with pytest.raises(UserError, match="lacks 1 of"):
        model.load_adapter(folder, "default")
    own = PeftModel.from_pretrained(build("llama"), folder)  # stock PEFT, with a warning
    assert type(own.base_model).__name__ == "LoraModel"


def test_interrupted_loading_leaves_no_trace(folder, monkeypatch):
    """Also for what nobody foresaw: a Ctrl-C between injecting and loading."""
    base = build("llama")
    before = frozen_copy(base)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(PeftModel, "load_adapter", interrupt)
    with pytest.raises(KeyboardInterrupt):
        loraplex.load_adapter(base, str(folder))
    assert same(base.state_dict(), before)
    assert not hasattr(base, "peft_config")
