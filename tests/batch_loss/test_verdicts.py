"""What was found out about a model is looked for again when the model changes, and what was switched is put back."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.tuner.tiny_models import config, llama, move, tokens
from torch import nn

from loraplex.kernels.packed_attention import PACKED_ATTENTION


def model(**fields) -> PeftModel:
    base = llama()
    base.set_attn_implementation("sdpa")
    return move(get_peft_model(base, config(**fields))).train()


def batch():
    ids = tokens(rows=2, length=6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def trainer_loss(adapted: PeftModel):
    """The loss as a Trainer asks for it: divided by the targets, and nothing else is read."""
    given = batch()
    return adapted(**given, num_items_in_batch=(given["labels"][:, 1:] != -100).sum())


def own_loss(adapted: PeftModel):
    return adapted.get_base_model()(**batch()).loss


def test_a_hook_on_the_head_that_comes_later_is_not_passed_by():
    adapted = model()
    assert trainer_loss(adapted).logits is None
    head = adapted.get_base_model().lm_head
    handle = head.register_forward_hook(lambda module, args, output: output * 0.5)
    torch.testing.assert_close(trainer_loss(adapted).loss, own_loss(adapted))
    handle.remove()
    assert trainer_loss(adapted).logits is None


def test_a_head_that_is_replaced_is_looked_at_again():
    class Capped(nn.Linear):
        def forward(self, x):
            return torch.tanh(super().forward(x))

    adapted = model()
    trainer_loss(adapted)
    base = adapted.get_base_model()
    other = nn.Linear(32, 64, bias=False).requires_grad_(False)
    base.set_output_embeddings(other)
    torch.testing.assert_close(trainer_loss(adapted).loss, own_loss(adapted))
    base.set_output_embeddings(Capped(32, 64, bias=False).requires_grad_(False))
    torch.testing.assert_close(trainer_loss(adapted).loss, own_loss(adapted))


def test_a_forward_that_is_replaced_is_looked_at_again():
    adapted = model()
    trainer_loss(adapted)
    base, original = adapted.get_base_model(), adapted.get_base_model().forward

    def doubled(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    base.forward = doubled
    assert trainer_loss(adapted).logits is not None


@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
def test_the_models_attention_is_given_back(leave):
    adapted = model()
    base = adapted.get_base_model()
    trainer_loss(adapted)
    assert base.config._attn_implementation == PACKED_ATTENTION
    assert getattr(adapted, leave)().config._attn_implementation == "sdpa"


def test_an_attention_that_the_user_has_chosen_stays():
    base = llama()
    base.set_attn_implementation(PACKED_ATTENTION)
    adapted = get_peft_model(base, config()).train()
    trainer_loss(adapted)
    assert adapted.unload().config._attn_implementation == PACKED_ATTENTION


def test_padding_free_is_the_active_adapters():
    adapted = model(padding_free=False)
    adapted.add_adapter("other", config(seed=4))
    assert trainer_loss(adapted).logits is not None
    adapted.set_adapter("other")
    assert trainer_loss(adapted).logits is None
    adapted.base_model.set_adapter(["other", "default"])
    assert trainer_loss(adapted).logits is not None
