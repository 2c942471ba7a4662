"""Every target on models that keep their weights in other ways than Llama."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from loraplex.export.exporting import ExportRequest, export
from loraplex.export.targets import TARGETS

pytestmark = pytest.mark.usefixtures("stock_in_process")


def gpt2() -> PreTrainedModel:
    """Transposed weights, queries, keys and values in one, and tied embeddings."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 128, "vocab_size": 320}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=1))


def qwen2() -> PreTrainedModel:
    """Biases, and rows in transformers' order in llama.cpp too."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 320}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=1))


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("build", [gpt2, qwen2])
def test_it_goes_everywhere(make, tiny_model: Path, tmp_path: Path, build, to: str) -> None:
    base = tmp_path / "base"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build().save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, base)
    adapter = make(base=base, r=3, alpha_pattern={"c_attn" if build is gpt2 else "q_proj": 9})
    done = export(ExportRequest(str(adapter), to, tmp_path / "out"))
    assert done.agreements
    for found in done.agreements:
        assert found.passed
        assert found.same_top1 == 1
