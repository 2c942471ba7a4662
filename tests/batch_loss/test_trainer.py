"""A training step under transformers' own Trainer: the loss and gradients of the full model, without its padding."""

import statistics

import pytest
import torch
from peft import get_peft_model
from tests.tuner.tiny_models import VOCABULARY, config, opt
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from loraplex import AdapterConfig, UserError
from loraplex.batch_loss import labeled

SIZES = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def adapted(cohere=False, **fields):
    torch.manual_seed(0)
    base = (
        CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)) if cohere else LlamaForCausalLM(LlamaConfig(**SIZES))
    )
    options = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False, "seed": 1}
    return get_peft_model(base, AdapterConfig(**options | fields)).train()


@pytest.fixture
def ragged():
    ids = torch.randint(0, 60, (3, 8), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(8) < torch.tensor([8, 5, 3])[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def gradients(model, **batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("cohere", [False, True], ids=["llama", "cohere-logit-scale"])
@pytest.mark.parametrize("items", [7, torch.tensor(31)], ids=["int", "tensor"])
def test_loss_and_gradients_are_those_of_the_base_models_own_forward(ragged, cohere, items):
    model = adapted(cohere)
    mine, found = gradients(model, **ragged, num_items_in_batch=items)
    model.peft_config["default"].padding_free = False
    theirs, expected = gradients(model, **ragged, num_items_in_batch=items)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_neither_padding_nor_unlabeled_positions_are_computed(ragged, monkeypatch):
    model, through_head, through_block = adapted(), [], []
    model(**ragged, num_items_in_batch=7)  # the look at the first batch is over
    original = labeled.label_log_probs
    monkeypatch.setattr(
        labeled, "label_log_probs", lambda rows, *rest: through_head.append(len(rows)) or original(rows, *rest)
    )
    model.get_base_model().model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, args, output: through_block.append(args[0].shape[:-1].numel())
    )
    assert model(**ragged, num_items_in_batch=7).logits is None
    assert (through_head, through_block) == ([int((ragged["labels"] != -100).sum())], [16])


def test_scaled_logits_are_noticed_and_left_to_the_model(ragged):
    assert adapted(cohere=True)(**ragged, num_items_in_batch=7).logits is not None


@pytest.mark.parametrize("change", ["eval", "no grad", "no count", "hidden states", "trainable head"])
def test_whoever_may_want_logits_gets_them(ragged, change):
    model, extra = adapted(), {"num_items_in_batch": 7}
    if change == "eval":
        model.eval()
    elif change == "no count":
        extra = {}
    elif change == "hidden states":
        extra["output_hidden_states"] = True
    elif change == "trainable head":
        model.get_base_model().lm_head.weight.requires_grad_()
    with torch.set_grad_enabled(change != "no grad"):
        assert model(**ragged, **extra).logits.shape == (3, 8, 60)


def test_the_look_at_the_first_batch_draws_no_random_number(ragged):
    model = adapted(lora_dropout=0.5)
    torch.manual_seed(3)
    first = model(**ragged, num_items_in_batch=7).loss
    torch.manual_seed(3)
    assert torch.equal(model(**ragged, num_items_in_batch=7).loss, first)


def test_left_padding_is_refused_where_packing_is_demanded(ragged):
    flipped = {name: tensor.flip(1) for name, tensor in ragged.items()}
    with pytest.raises(UserError, match="padded on the left"):
        adapted(padding_free=True)(**flipped, num_items_in_batch=7)


@pytest.mark.parametrize("shortest_last", [False, True])
def test_labels_on_padding_count_as_the_base_model_counts_them(ragged, shortest_last):
    """`labels = input_ids.copy()` after padding to a length: a habit of tutorials."""
    batch = {name: tensor if shortest_last else tensor.flip(0) for name, tensor in ragged.items()}
    batch["labels"] = batch["input_ids"].clone()
    model = adapted()
    mine, found = gradients(model, **batch, num_items_in_batch=9)
    model.peft_config["default"].padding_free = False
    theirs, expected = gradients(model, **batch, num_items_in_batch=9)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
    with pytest.raises(UserError, match="stand on padding"):
        adapted(padding_free=True)(**batch, num_items_in_batch=9)


def test_bfloat16_autocast_trains_ragged_batches_no_worse_than_padded_ones(ragged):
    """RoPE leaves queries and keys in float32, the values come in bfloat16: attention casts, as torch's own does."""
    errors = {"auto": [], False: []}
    for model in (adapted(seed=seed) for seed in range(4)):
        _, exact = gradients(model, **ragged, num_items_in_batch=7)
        for padding_free, found in errors.items():
            model.peft_config["default"].padding_free = padding_free
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**ragged, num_items_in_batch=7).loss
            model.zero_grad()
            loss.backward()
            named = dict(model.named_parameters())
            found += [float((named[name].grad - exact[name]).norm() / exact[name].norm()) for name in exact]
    ours, stock = (statistics.median(found) for found in errors.values())
    assert 0 < ours <= 1.2 * stock


def test_a_trainer_that_reads_logits_gets_them(ragged):
    """SFTTrainer before 1.16, with loss_type='nll': it says `use_cache`, which the Trainer never does."""
    model = adapted()
    output = model(**ragged, num_items_in_batch=7, use_cache=False)
    assert output.logits.shape == (3, 8, SIZES["vocab_size"])
    torch.testing.assert_close(model(**ragged, num_items_in_batch=7).loss, output.loss, rtol=1e-5, atol=1e-6)


def test_a_model_that_runs_a_part_of_its_backbone_computes_its_own_loss(ragged):
    model = get_peft_model(opt(), config("opt")).train()
    batch = {name: tensor.clamp(max=VOCABULARY - 1) for name, tensor in ragged.items()}
    losses = []
    for padding_free in ("auto", False):
        model.peft_config["default"].padding_free = padding_free
        torch.manual_seed(0)  # OPT draws dropout in functions, not in modules
        losses.append(model(**batch, num_items_in_batch=7).loss)
    assert torch.equal(*losses)


def test_an_unmodified_trainer_learns_the_same_with_and_without(tmp_path):
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 60, (int(length),), generator=draw).tolist() for length in range(3, 27)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>"
    )
    curves = []
    for padding_free in ("auto", False):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
            learning_rate=1e-2, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
            eval_strategy="steps", eval_steps=3,
        )  # fmt: skip
        run = Trainer(
            adapted(padding_free=padding_free),
            arguments,
            train_dataset=data,
            eval_dataset=data,
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )
        run.train()
        curves.append([entry.get("loss", entry.get("eval_loss")) for entry in run.state.log_history[:-1]])
    assert len(curves[0]) == 8
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
