"""Packed sequences through real models: loss and every gradient equal those of the padded batch, in float64."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from loraplex.errors import UserError
from loraplex.kernels.packed_attention import PACKED_ATTENTION, packed_attention

SIZES = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LENGTHS = [5, 1, 9, 3]


def llama(attention=PACKED_ATTENTION):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, attn_implementation=attention)).double()


def models():
    torch.manual_seed(0)
    yield "llama", llama()
    yield "qwen2", Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, attn_implementation=PACKED_ATTENTION)).double()
    gpt2 = GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4, attn_implementation=PACKED_ATTENTION)
    yield "gpt2", GPT2LMHeadModel(gpt2).double().eval()


def rows(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (length,), generator=generator) for length in LENGTHS]


def padded(sequences, left=False):
    longest = max(map(len, sequences))
    ids, mask = torch.zeros(2, len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if left else slice(len(sequence))
        ids[row, place] = sequence
        mask[row, place] = 1
    return ids, mask


def packed(sequences):
    ids = torch.cat(sequences)[None]
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
    return ids, positions


def losses_and_gradients(model, logits_of_real_tokens, sequences):
    labels = torch.cat([sequence[1:] for sequence in sequences])
    keep = torch.cat([torch.arange(len(s)) < len(s) - 1 for s in sequences])
    loss = torch.nn.functional.cross_entropy(logits_of_real_tokens[keep], labels)
    model.zero_grad()
    loss.backward()
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("borders", ["positions", "cu_seq_lens"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_loss_and_every_gradient_equal_the_padded_batch(borders, left):
    for name, model in models():
        if left and name == "gpt2":
            continue  # absolute positions: transformers numbers left padding unless told otherwise
        sequences = rows()
        ids, mask = padded(sequences, left)
        reference = losses_and_gradients(model, model(ids, attention_mask=mask).logits[mask.bool()], sequences)
        flat, positions = packed(sequences)
        extra = {}
        if borders == "cu_seq_lens":
            cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
            extra = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 9, "max_length_k": 9}
        if borders == "cu_seq_lens" and name == "gpt2":
            extra = {}
        logits = model(flat, position_ids=positions, use_cache=False, **extra).logits[0]
        loss, gradients = losses_and_gradients(model, logits, sequences)
        torch.testing.assert_close(loss, reference[0], rtol=1e-9, atol=1e-9)
        for key, gradient in reference[1].items():
            # Llama's norms and rotary tables are float32 inside
            torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-7, msg=f"{name} {key}")


def test_a_sequence_does_not_see_its_neighbours():
    model, sequences = llama(), rows()
    flat, positions = packed(sequences)
    before = model(flat, position_ids=positions, use_cache=False).logits[0]
    changed = flat.clone()
    changed[0, :6] = (changed[0, :6] + 1) % 50
    after = model(changed, position_ids=positions, use_cache=False).logits[0]
    assert torch.equal(before[6:], after[6:])
    assert not torch.equal(before[:6], after[:6])


def test_padded_batches_caches_and_single_rows_are_sdpa_bit_for_bit():
    ours, theirs = llama().eval(), llama("sdpa").eval()
    ids, mask = padded(rows())
    assert torch.equal(ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits)
    left, left_mask = padded(rows(), left=True)
    generated = [
        model.generate(left, attention_mask=left_mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
        for model in (ours, theirs)
    ]
    assert torch.equal(*generated)
    row = rows()[2][None]
    assert torch.equal(ours(row).logits, theirs(row).logits)


def test_packed_rows_with_an_empty_cache_are_still_separated():
    model, sequences = llama(), rows()
    flat, positions = packed(sequences)
    cached = model(flat, position_ids=positions, use_cache=True).logits
    assert torch.equal(cached, model(flat, position_ids=positions, use_cache=False).logits)


def test_a_sliding_window_keeps_its_mask():
    def mistral(window):
        torch.manual_seed(0)
        config = MistralConfig(**SIZES, **HEADS, sliding_window=window, attn_implementation=PACKED_ATTENTION)
        return MistralForCausalLM(config)

    flat, positions = packed(rows())
    ids, mask = padded(rows())
    for window in (64, 4):
        model = mistral(window)
        reference = model(ids, attention_mask=mask).logits[mask.bool()]
        logits = model(flat, position_ids=positions, use_cache=False).logits[0]
        torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_it_cannot_compute_is_refused(name):
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(UserError, match=f"uses {name}, which packed attention does not compute"):
        packed_attention(torch.nn.Linear(1, 1), q, q, q, None, **{name: torch.ones(2)})


def test_over_packed_rows_window_and_position_bias_are_refused():
    q, positions = torch.randn(1, 2, 6, 8), torch.tensor([[0, 1, 2, 3, 0, 1]])
    with pytest.raises(UserError, match="sliding window of 3, shorter than a packed sequence of 4"):
        packed_attention(torch.nn.Linear(1, 1), q, q, q, None, position_ids=positions, sliding_window=3)
    with pytest.raises(UserError, match="has a position bias"):
        packed_attention(torch.nn.Linear(1, 1), q, q, q, None, position_ids=positions, position_bias=q)
    two = torch.randn(2, 2, 6, 8)
    with pytest.raises(UserError, match="must lie in one row"):
        packed_attention(torch.nn.Linear(1, 1), two, two, two, None, position_ids=positions.repeat(2, 1))
