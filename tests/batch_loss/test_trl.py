"""The tuner's answer to TRL's fused head against TRL's own, field by field and gradient by gradient."""

import pytest
import torch
from peft import get_peft_model
from tests.extras import FUSED_HEAD
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from loraplex import AdapterConfig, UserError
from loraplex.batch_loss import trl
from loraplex.batch_loss.packing import pack, unsupported
from loraplex.kernels.packed_attention import PACKED_ATTENTION

pytestmark = FUSED_HEAD

SIZES = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SFT = ("log_probs", "entropy", "is_top1")


def adapted(outputs=SFT, cohere=False, **head):
    torch.manual_seed(0)
    cls, config = (CohereForCausalLM, CohereConfig) if cohere else (LlamaForCausalLM, LlamaConfig)
    extra = {"logit_scale": 0.25} if cohere else {}
    base = cls(config(**SIZES, **extra))
    model = get_peft_model(
        base,
        AdapterConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, seed=1),
    )
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model.get_base_model(), outputs=outputs, **head)
    return model


@pytest.fixture
def batch():
    ids = torch.randint(0, 60, (3, 8), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 6:] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def gradients(model, output):
    model.zero_grad()
    (-output.log_probs.sum() / output.label_mask.sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("cohere", [False, True], ids=["llama", "cohere-logit-scale"])
def test_every_field_and_gradient_equals_trls_own(cohere, batch):
    model = adapted(cohere=cohere)
    assert trl.settings_of(model.get_base_model()) is not None
    ours = model(**batch, fused_lm_head=True)
    theirs = model.get_base_model()(**batch, fused_lm_head=True)
    for field in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=1e-5, atol=1e-6, msg=field)
    mine, reference = gradients(model, ours), gradients(model, theirs)
    for name, gradient in reference.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_num_items_divides_the_loss(batch):
    model = adapted()
    ours = model(**batch, fused_lm_head=True, num_items_in_batch=torch.tensor(31))
    theirs = model.get_base_model()(**batch, fused_lm_head=True, num_items_in_batch=torch.tensor(31))
    torch.testing.assert_close(ours.loss, theirs.loss)


@pytest.mark.parametrize(
    "head", [{"outputs": ("log_probs",)}, {"temperature": 0.7}, {"cast_lm_head_to_fp32": True}], ids=str
)
def test_what_other_trainers_ask_for_is_left_to_trl(head, batch):
    model = adapted(**head)
    assert trl.compute_output(model.get_base_model(), (), {**batch, "fused_lm_head": True}) is None
    assert model(**batch, fused_lm_head=True).log_probs.shape == (3, 7)


def test_a_trainable_head_is_left_to_trl(batch):
    model = adapted()
    model.get_base_model().lm_head.weight.requires_grad_()
    assert trl.compute_output(model.get_base_model(), (), {**batch, "fused_lm_head": True}) is None


def test_a_batch_without_labels_trains_as_a_zero(batch):
    model = adapted()
    batch["labels"][:] = -100
    output = model(**batch, fused_lm_head=True)
    assert output.loss.item() == 0
    output.log_probs.sum().backward()


@pytest.fixture
def ragged(batch):
    lengths = torch.tensor([8, 5, 3])
    mask = (torch.arange(8) < lengths[:, None]).long()
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": batch["input_ids"], "labels": labels, "attention_mask": mask}


def test_a_padded_batch_is_packed_and_gives_the_same_fields_and_gradients(ragged):
    model = adapted()
    ours = model(**ragged, fused_lm_head=True)
    assert model.config._attn_implementation == PACKED_ATTENTION
    theirs = model.get_base_model()(**ragged, fused_lm_head=True)
    for field in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=1e-5, atol=1e-6, msg=field)
    mine, reference = gradients(model, ours), gradients(model, theirs)
    for name, gradient in reference.items():
        # another order of additions in float32: against the size of the whole gradient, not of an entry near zero
        assert (mine[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_packing_computes_no_padding(ragged):
    model = adapted()
    seen = []
    model.get_base_model().model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[:-1].numel())
    )
    model(**ragged, fused_lm_head=True)
    model.peft_config["default"].padding_free = False
    model(**ragged, fused_lm_head=True)
    assert seen == [16, 24]


def packed(model, batch):
    return pack(model, {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"] != -100, "auto")


def test_left_padding_is_left_alone_or_refused(ragged):
    flipped = {name: tensor.flip(1) for name, tensor in ragged.items()}
    flipped["labels"][:, 0] = -100
    model = adapted()
    assert packed(model.get_base_model(), flipped) is None
    model.peft_config["default"].padding_free = True
    with pytest.raises(UserError, match="padding_free is on, but the batch is padded on the left"):
        model(**flipped, fused_lm_head=True)


def test_flash_attention_stays_and_gets_the_borders(ragged):
    model = adapted().get_base_model()
    # The name alone: its kernels need a GPU, and they are not called here.
    model.config._attn_implementation = "flash_attention_2"
    batch = packed(model, ragged)
    assert model.config._attn_implementation == "flash_attention_2"
    assert batch.inputs["cu_seq_lens_q"].tolist() == batch.inputs["cu_seq_lens_k"].tolist() == [0, 8, 13, 16]
    assert batch.inputs["max_length_q"] == batch.inputs["max_length_k"] == 8
    assert batch.inputs["position_ids"].tolist() == [[*range(8), *range(5), *range(3)]]
    assert "attention_mask" not in batch.inputs


def test_models_that_cannot_be_packed_say_why():
    window = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
    assert "layers other than full attention" in unsupported(window)
    encoder = BertForSequenceClassification(BertConfig(**SIZES))
    assert "is not a causal language model" in unsupported(encoder)
    eager = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))
    assert "packing needs 'sdpa'" in unsupported(eager)
    assert unsupported(LlamaForCausalLM(LlamaConfig(**SIZES))) is None


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_packing_under_gradient_checkpointing_changes_no_gradient(ragged, reentrant):
    model = adapted().train()
    plain = gradients(model, model(**ragged, fused_lm_head=True))
    assert model.config._attn_implementation == PACKED_ATTENTION
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients(model, model(**ragged, fused_lm_head=True))
    assert plain
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-9, msg=name)
