"""Log-probabilities of completions against a loop over single rows with full logits in fp64."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loraplex.evaluation import log_probs
from loraplex.evaluation.log_probs import SHARES_PROMPTS, ScoredItem, completion_log_probs
from loraplex.kernels.packed_attention import PACKED_ATTENTION

VOCABULARY = 64
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
OWN_SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mistral": {**SIZES, "sliding_window": None},
    "phi3": {**SIZES, "sliding_window": None},
}
# Not asked to share prompts: a sliding window, positions made from the padding mask, ALiBi.
OTHERS = ["gemma2", "opt", "bloom", "starcoder2"]

# transformers takes the softmax of eager attention in fp32, whatever the model is in.
EAGER = 1e-6


def make_model(model_type: str) -> Any:
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    sizes = OWN_SIZES.get(model_type, SIZES)
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, **ends, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


def make_items(count: int = 9) -> list[ScoredItem]:
    """Return items of odd shapes: one completion and many, one token and several; token 0, the padding, among them."""
    generator = torch.Generator().manual_seed(0)

    def draw(high: int) -> int:
        return int(torch.randint(0, high, (), generator=generator))

    def ids(longest: int) -> list[int]:
        return [draw(VOCABULARY) for _ in range(1 + draw(longest))]

    items = [ScoredItem(ids(12), [ids(6) for _ in range(1 + draw(4))]) for _ in range(count)]
    return [*items, ScoredItem([0, 1, 0], [[0, 0], [], [1]])]


def naive(model: Any, items: list[ScoredItem]) -> list[tuple[float, ...]]:
    """Score every completion in a row of its own, without padding."""
    found = []
    for item in items:
        values = []
        for completion in item.completions:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([item.prompt + completion])).logits[0].double()
            steps = logits.log_softmax(dim=1)[len(item.prompt) - 1 : -1]
            values.append(sum(float(step[token]) for step, token in zip(steps, completion, strict=True)))
        found.append(tuple(values))
    return found


def assert_equal(found: list[tuple[float, ...]], expected: list[tuple[float, ...]], tolerance: float) -> None:
    assert [len(values) for values in found] == [len(values) for values in expected]
    for got, wanted in zip(found, expected, strict=True):
        assert got == pytest.approx(wanted, abs=tolerance)


@pytest.mark.parametrize("model_type", sorted(SHARES_PROMPTS))
def test_a_shared_prompt_gives_what_single_rows_give(model_type: str) -> None:
    model, items = make_model(model_type), make_items()
    assert log_probs._shares_prompts(model)
    assert_equal(completion_log_probs(model, items, batch_size=4), naive(model.eval(), items), 1e-12)


def test_a_model_that_has_trained_without_padding_still_shares_its_prompts() -> None:
    model, items = make_model("llama"), make_items()
    model.set_attn_implementation(PACKED_ATTENTION)
    assert log_probs._shares_prompts(model)
    assert_equal(completion_log_probs(model, items), naive(model, items), 1e-12)


@pytest.mark.parametrize("model_type", [*OTHERS, "llama"])
def test_rows_of_their_own_give_the_same(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = make_model(model_type), make_items()
    if model_type == "llama":
        monkeypatch.setattr(log_probs, "SHARES_PROMPTS", frozenset())
    assert not log_probs._shares_prompts(model)
    assert_equal(completion_log_probs(model, items, batch_size=4), naive(model.eval(), items), EAGER)


@pytest.mark.parametrize(("name", "value"), [("sliding_window", 8), ("layer_types", ["sliding_attention"] * 2)])
def test_a_windowed_model_does_not_share(name: str, value: Any) -> None:
    model = make_model("mistral")
    setattr(model.config, name, value)
    assert not log_probs._shares_prompts(model)


def test_eager_attention_does_not_share() -> None:
    model, items = make_model("llama"), make_items()
    model.set_attn_implementation("eager")
    assert not log_probs._shares_prompts(model)
    assert_equal(completion_log_probs(model, items), naive(model.eval(), items), EAGER)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_and_chunks_change_nothing(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = make_model("llama"), make_items()
    expected = naive(model.eval(), items)
    monkeypatch.setattr(log_probs, "MOST_LOGITS", 5)
    monkeypatch.setattr(log_probs, "MOST_TOKENS", 60)
    assert_equal(completion_log_probs(model, items, batch_size=batch_size), expected, 1e-12)


def test_single_precision_is_close() -> None:
    model, items = make_model("llama"), make_items()
    expected = naive(model.eval(), items)
    assert_equal(completion_log_probs(model.float(), items), expected, 1e-4)


def test_an_adapter_counts_and_switching_it_off_does_too() -> None:
    from peft import LoraConfig, get_peft_model

    base, items = make_model("llama"), make_items()
    plain = completion_log_probs(base, items)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    adapted = completion_log_probs(model, items)
    assert_equal(adapted, naive(model.eval(), items), 1e-5)
    assert adapted[0] != pytest.approx(plain[0], abs=1e-3)
    with model.disable_adapter():
        assert_equal(completion_log_probs(model, items), plain, 1e-12)


def test_every_module_gets_its_mode_back() -> None:
    model = make_model("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    completion_log_probs(model, make_items(1))
    assert [module.training for module in model.modules()] == before


def test_nothing_to_score() -> None:
    assert completion_log_probs(make_model("llama"), []) == []
