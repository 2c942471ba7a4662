"""Random models of four architectures, small enough that every test takes moments, and moves away from their start."""

from collections.abc import Iterator

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from loraplex import AdapterConfig

VOCABULARY = 64
KINDS = ("lora", "dora")
ARCHITECTURES = ("llama", "qwen2", "gpt2", "bert")


def llama(**overrides) -> LlamaForCausalLM:
    """Grouped queries, no biases."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return _random(LlamaForCausalLM, LlamaConfig(**{**sizes, **heads, "pad_token_id": 0, **overrides}))


def qwen2() -> Qwen2ForCausalLM:
    """Biases on queries, keys and values."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return _random(Qwen2ForCausalLM, Qwen2Config(**sizes, **heads, pad_token_id=0))


def gpt2() -> GPT2LMHeadModel:
    """Conv1D, which stores the transposed weight, and tied embeddings."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64, "vocab_size": VOCABULARY}
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return _random(GPT2LMHeadModel, GPT2Config(**sizes, **tokens))


def bert() -> BertForSequenceClassification:
    """An encoder with a classification head of three classes."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    config = BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, num_labels=3)
    return _random(BertForSequenceClassification, config)


def opt(do_layer_norm_before: bool = True) -> OPTForCausalLM:
    """Norms before the branches, or on the sums as OPT-350M has them."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    places = {"num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return _random(OPTForCausalLM, OPTConfig(**sizes, **places, **tokens, do_layer_norm_before=do_layer_norm_before))


def opt_post() -> OPTForCausalLM:
    return opt(do_layer_norm_before=False)


def build(architecture: str) -> PreTrainedModel:
    made = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "bert": bert, "opt": opt, "opt-post": opt_post}
    return made[architecture]()


def _random(cls: type[PreTrainedModel], config) -> PreTrainedModel:
    """The same random numbers at every call; biases are not zero."""
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def config(architecture: str = "llama", **fields) -> AdapterConfig:
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "seed": 3}
    defaults["task_type"] = "SEQ_CLS" if architecture == "bert" else "CAUSAL_LM"
    return AdapterConfig(**{**defaults, **fields})


def adapted(architecture: str = "llama", *, name: str = "default", moved: bool = True, **fields) -> PeftModel:
    """A model with one adapter, moved away from its initial point, in evaluation mode."""
    model = get_peft_model(build(architecture), config(architecture, **fields), adapter_name=name)
    return (move(model) if moved else model).eval()


def move(model: nn.Module, seed: int = 5, scale: float = 0.1) -> nn.Module:
    """Add noise to every trainable parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (scale * noise).to(parameter.dtype)
    return model


def trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def tokens(rows: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, input_ids: Tensor | None = None, **kwargs) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens() if input_ids is None else input_ids, **kwargs).logits


def gradients(model: nn.Module, **kwargs) -> dict[str, Tensor]:
    """Gradients of a causal language model's loss by parameter name."""
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens(), **kwargs).loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys and the same bits."""
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


def frozen_copy(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}
