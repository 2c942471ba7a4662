"""Settings for every test: no network, one thread; and tiny models with recipes that train them."""

import os

# Read when the hub client and torch are first imported, so set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models are tiny: more threads would spend their time waiting for each other, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.warm_python import WarmPython

WORDS = "the cat sat on the mat and the dog ran over the hill while rain fell"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama in float32 and a byte-level BPE tokenizer trained on a few words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([WORDS] * 10, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 320}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=0, pad_token_id=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """Python processes that have imported what a job of a comparison imports: torch to loraplex."""
    from loraplex.comparison.workers import MODULES

    with WarmPython(MODULES) as python:
        yield python


@pytest.fixture(scope="session")
def stock_python() -> Iterator[WarmPython]:
    """Python processes that have imported torch, transformers and PEFT, and have never heard of loraplex."""
    with WarmPython(("torch", "transformers", "peft", "safetensors.torch")) as python:
        yield python


@pytest.fixture
def tiny_recipe(tiny_model: Path, tmp_path: Path) -> Path:
    """The recipe of `write_tiny_recipe` in a folder of its own."""
    return write_tiny_recipe(tmp_path, tiny_model)


def write_tiny_recipe(folder: Path, model: Path) -> Path:
    """Write a recipe that trains `model` for six steps on 24 rows of two options, with dropout."""
    words = WORDS.split()
    rows = [
        {"question": f"{words[i % 16]} {words[i * 3 % 16]}?", "choices": ["cat", "dog sat on the mat"], "answer": i % 2}
        for i in range(24)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"output: {folder / 'run'}\n"
        f"model: {{name: {model}, dtype: float32}}\n"
        "adapter: {adapter: lora, r: 2, lora_dropout: 0.1}\n"
        f"data: {{train: {data}, test: {data}}}\n"
        "training: {max_steps: 6, batch_size: 4, save_every: 3, learning_rate: 1e-2}\n"
    )
    return recipe


@pytest.fixture(scope="session")
def native_adapters() -> None:
    """Skip where transformers' own `add_adapter` refuses stock LoRA with the PEFT that is here, with its reason."""
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    try:
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1)).add_adapter(LoraConfig(target_modules=["q_proj"]))
    except (ImportError, ValueError) as error:
        pytest.skip(f"transformers refuses stock LoRA too: {error}")


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer BERT without any head, and a tokenizer of whole words that knows pairs."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-encoder")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    words = [*special.values(), *dict.fromkeys(WORDS.split())]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **special).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": len(words)}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(**sizes, **still, num_attention_heads=4, max_position_embeddings=40)).save_pretrained(
            folder
        )
    return folder


@pytest.fixture
def pairs_recipe(tiny_encoder: Path, tmp_path: Path) -> Path:
    """The recipe of `write_pairs_recipe` in a folder of its own."""
    return write_pairs_recipe(tmp_path, tiny_encoder)


def write_pairs_recipe(folder: Path, encoder: Path) -> Path:
    """Write a recipe that trains `encoder` for eight steps to tell whether the second text has a cat in it."""
    words = WORDS.split()
    rows = [
        {
            "first": " ".join(words[i % 11 : i % 11 + 3 + i % 4]),
            "other": f"{words[i * 5 % 16]} {['dog', 'cat'][i % 2]}",
            "label": i % 2,
        }
        for i in range(40)
    ]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"output: {folder / 'run'}\n"
        f"model: {{name: {encoder}, head: classification}}\n"
        "adapter: {adapter: lora, r: 4}\n"
        f"data: {{train: {data}, test: {data}, prompt: '{{first}}', second: '{{other}}', choices: [dog, cat], "
        "answer: label}\n"
        "training: {max_steps: 8, batch_size: 8, save_every: 4, learning_rate: 1e-2}\n"
    )
    return recipe
