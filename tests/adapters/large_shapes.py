"""Numbers of trainable parameters on the shapes of Llama-2-7B, counted on the meta device."""

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex import AdapterConfig

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def count(adapter, r, targets, **sizes) -> int:
    """Trainable parameters; `sizes` replace those of Llama-2-7B."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **sizes))
        adapted = get_peft_model(model, AdapterConfig(adapter=adapter, r=r, target_modules=targets, seed=0))
    return adapted.get_nb_trainable_parameters()[0]
