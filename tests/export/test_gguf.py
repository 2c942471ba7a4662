"""The file for llama.cpp: its names, its order of rows, its metadata, and the same function."""

import gguf
import numpy as np
import pytest
import torch

from loraplex import UserError
from loraplex.export.exporting import ExportRequest, export
from loraplex.export.gguf import ARCHITECTURES, FILE, permute, place, read_as_llama_cpp, unpermute
from loraplex.models.embedded import GGUF_NAME, MODEL
from loraplex.models.loading import load_config, load_model
from loraplex.models.packaged import package_dir


def test_the_file_computes_what_the_adapter_does(make) -> None:
    adapter = make(rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7}, alpha_pattern={"v_proj": 30})
    done = export(ExportRequest(str(adapter), "gguf", adapter.with_name("out")))
    (found,) = done.agreements
    assert found.reader == "llama.cpp's Python reader"
    assert found.passed
    assert found.max_difference <= 1e-5 * found.largest_logit
    reader = gguf.GGUFReader(done.folder / FILE)
    said = {key: reader.get_field(key).contents() for key in reader.fields if key.startswith(("general.", "adapter."))}
    assert said == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 7.0,
        "general.file_type": 0,
    }
    shapes = {tensor.name: tuple(tensor.shape.tolist()) for tensor in reader.tensors}
    # llama.cpp's own order: ne[0] first, so A is (in, r) and B is (r, out)
    assert shapes["blk.1.ffn_up.weight.lora_a"] == (32, 7)
    assert shapes["blk.1.ffn_up.weight.lora_b"] == (7, 48)
    assert shapes["blk.0.attn_k.weight.lora_b"] == (7, 16)
    assert len(shapes) == 2 * 14


def test_the_order_of_the_rows_matters_and_is_undone(make, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make(target_modules=["q_proj", "k_proj"])
    monkeypatch.setattr("loraplex.export.gguf.unpermute", lambda rows, heads: rows)
    with pytest.raises(UserError, match="does not compute what the adapter does"):
        export(ExportRequest(str(adapter), "gguf", adapter.with_name("out")))


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_rows_that_turn_together_become_neighbours(heads: int) -> None:
    rows = torch.arange(heads * 8)[:, None]
    permuted = permute(rows, heads)
    assert permuted[:4, 0].tolist() == [0, 4, 1, 5]
    assert torch.equal(unpermute(permuted, heads), rows)


@pytest.mark.parametrize(("dtype", "file_type"), [("float16", 1), ("bfloat16", 32)])
def test_smaller_data_types(make, dtype: str, file_type: int) -> None:
    adapter = make()
    done = export(ExportRequest(str(adapter), "gguf", adapter.with_name("out"), dtype=dtype))
    reader = gguf.GGUFReader(done.folder / FILE)
    assert reader.get_field("general.file_type").contents() == file_type
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {{"float16": "F16", "bfloat16": "BF16"}[dtype]}
    assert done.agreements[0].max_difference > 0


def test_what_llama_cpp_has_no_form_for_is_refused(make) -> None:
    adapter = make(adapter="dora")
    with pytest.raises(UserError, match=r"llama\.cpp takes plain LoRA only"):
        export(ExportRequest(str(adapter), "gguf", adapter.with_name("out")))


def test_names_of_every_architecture() -> None:
    """One site of each kind, against the names in llama.cpp's sources."""
    assert {name.name for name in ARCHITECTURES.values()} == {
        gguf.MODEL_ARCH[name] for name in ("LLAMA", "QWEN2", "QWEN3", "GEMMA", "GEMMA2", "GPT2")
    }
    for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"):
        config = type("Config", (), {"model_type": kind, "num_hidden_layers": 3, "num_attention_heads": 4})
        assert place("model.layers.2.self_attn.o_proj", config) == ("blk.2.attn_output.weight", None)
        assert place("model.layers.2.mlp.gate_proj", config) == ("blk.2.ffn_gate.weight", None)
        heads = 4 if kind in ("llama", "mistral") else None
        assert place("model.layers.0.self_attn.q_proj", config) == ("blk.0.attn_q.weight", heads)
        assert place("model.layers.3.self_attn.q_proj", config) is None
    config = type("Config", (), {"model_type": "gpt2", "num_hidden_layers": 1, "num_attention_heads": 4})
    assert place("transformer.h.0.attn.c_attn", config) == ("blk.0.attn_qkv.weight", None)
    assert place("transformer.h.0.mlp.c_proj", config) == ("blk.0.ffn_down.weight", None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("general.type", "model", "general.type is 'model'"), ("adapter.type", "dora", "adapter.type is 'dora'")],
)
def test_the_reader_refuses_what_llama_cpp_refuses(tmp_path, key: str, value: str, message: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / FILE, "llama")
    for name, text in {"general.type": "adapter", "adapter.type": "lora", key: value}.items():
        writer.add_string(name, text)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((2, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=message):
        read_as_llama_cpp(tmp_path / FILE)


@pytest.mark.slow
def test_against_a_file_that_llama_cpp_has_made() -> None:
    """The embedded model comes out of one: every site has a tensor of its shape there, with its rows in our order."""
    made = {tensor.name: tensor for tensor in gguf.GGUFReader(package_dir(MODEL) / GGUF_NAME).tensors}
    config, model = load_config("embedded"), load_model("embedded", "float32")
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        where = place(name, config)
        assert where is not None
        assert made[where.tensor].shape.tolist() == [module.in_features, module.out_features]
        if name.startswith(("model.layers.0.", "model.layers.17.self_attn.")):
            tensor = made[where.tensor]
            values = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
            ours = module.weight.detach() if where.heads is None else permute(module.weight.detach(), where.heads)
            # the embedded folder is rounded to bfloat16
            torch.testing.assert_close(ours, values, rtol=2**-8, atol=1e-6)
