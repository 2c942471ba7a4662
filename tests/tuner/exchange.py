"""Configurations whose adapters go from loraplex to stock PEFT and back: every field that a folder can carry."""

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from tests.tuner.tiny_models import KINDS, build, config, move

from loraplex.tuner.peft_lora import to_lora_config

FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rank_pattern": ("llama", {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7}}),
    "alpha_pattern": ("llama", {"alpha_pattern": {"v_proj": 2.5, "model.layers.0.mlp.up_proj": 11}}),
    "both_patterns": ("llama", {"rank_pattern": {"^model.layers.0.*_proj": 3}, "alpha_pattern": {"q_proj": 1}}),
    "rslora": ("llama", {"use_rslora": True, "rank_pattern": {"k_proj": 2}}),
    "bias_lora_only": ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]}),
    "bias_all": ("qwen2", {"bias": "all", "target_modules": ["q_proj", "down_proj"]}),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]}),
    "exclude_names": ("llama", {"exclude_modules": ["v_proj", "layers.0.mlp.up_proj"]}),
    "exclude_expression": ("llama", {"exclude_modules": r".*layers\.1\..*"}),
    "one_expression": ("llama", {"target_modules": r"model\.layers\.\d\.self_attn\.[qv]_proj"}),
    "layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "layers_pattern": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "tokens": ("llama", {"trainable_token_indices": [3, 5, 8], "target_modules": ["q_proj"]}),
    "tokens_by_module": ("llama", {"trainable_token_indices": {"embed_tokens": [4]}, "target_modules": ["q_proj"]}),
    "tied_tokens": ("gpt2", {"trainable_token_indices": [3, 5]}),
    "conv1d": ("gpt2", {}),
    "conv1d_bias": ("gpt2", {"bias": "all"}),
    "qwen2": ("qwen2", {}),
    "classifier": ("bert", {}),
    "classifier_bias": ("bert", {"bias": "all"}),
    "dropout": ("llama", {"lora_dropout": 0.2}),
}
"""Name -> (architecture, fields of the config)."""

CASES = [(name, adapter) for name in FIELDS for adapter in KINDS]


def our_config(name: str, adapter: str):
    architecture, fields = FIELDS[name]
    fields = dict(fields)
    if fields.pop("use_rslora", False):
        return config(architecture, adapter={"name": adapter, "use_rslora": True}, **fields)
    return config(architecture, adapter=adapter, **fields)


def ours(name: str, adapter: str) -> PeftModel:
    """A loraplex model of that configuration, away from its initial point."""
    return move(get_peft_model(build(FIELDS[name][0]), our_config(name, adapter))).eval()


def stock(name: str, adapter: str) -> PeftModel:
    """A model of PEFT's own tuner of that configuration, away from its initial point."""
    lora = to_lora_config(our_config(name, adapter))
    assert type(lora) is LoraConfig
    return move(get_peft_model(build(FIELDS[name][0]), lora), seed=9).eval()
