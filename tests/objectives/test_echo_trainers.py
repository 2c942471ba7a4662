"""The objective under trainers as they are: Trainer, SFTTrainer, a plain loop; what cannot work says so at once."""

import json
from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.objectives.echoing import (
    BLOCKS,
    BOUNDARIES,
    echoing,
    flattened,
    items,
    objective_of,
    options,
    padded,
    rows,
    targets_of,
)
from tests.reference import echo as oracle
from tests.tuner.tiny_models import VOCABULARY, config, llama, logits, opt, same
from tests.tuner.trainer_arguments import arguments as defaults
from tests.tuner.trl_trainers import letters, other_loss
from transformers import (
    DataCollatorForSeq2Seq,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import loraplex
from loraplex import UserError
from loraplex.tuner.layer import SiteLayer

RANDOM = {"name": "echo", "probability": 0.6, "target_dropout": 0.2, "ramp": 0.5}


@pytest.fixture(scope="module")
def tokenizer():
    return letters()


LENGTHS = [(3 + i % 4, 2 + (i * 5) % 6) for i in range(24)]


def data():
    given = rows(LENGTHS)
    return Dataset.from_dict({"input_ids": [ids for ids, _ in given], "labels": [labels for _, labels in given]})


def arguments(folder, **overrides):
    return defaults(folder, **{"max_steps": 4, "weight_decay": 0.1, **overrides})


def fresh(objective=RANDOM, adapter="lora", dtype=torch.float32, moved=False, **fields):
    return echoing(objective, adapter=adapter, dtype=dtype, moved=moved, **{"seed": 3, **fields})


def run(kind, model, folder, tokenizer, **overrides):
    if kind == "sft":
        given = {"bf16": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        args = SFTConfig(**arguments(folder, **{**given, **overrides}))
        return SFTTrainer(model=model, args=args, train_dataset=data(), processing_class=tokenizer)
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments(folder, **overrides)),
        train_dataset=data(),
        eval_dataset=data(),
        data_collator=collator,
    )


def history(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


KINDS = pytest.mark.parametrize("kind", ["trainer", "sft"])


@KINDS
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("attention", "exact"), [("eager", 1e-6), ("sdpa", 1e-5)])
def test_the_first_step_is_the_oracles(kind, accumulation, attention, exact, tokenizer, tmp_path):
    """SGD at rate 1: what the parameters move by is the gradient that the trainer had.

    With sdpa the rows lose their padding and the second pass looks back, where Llama rounds its norms to float32.
    """
    base = llama(num_hidden_layers=BLOCKS)
    base.set_attn_implementation(attention)
    model = echoing(options(), base=base, moved=True)
    start = deepcopy(model)
    size = 6 // accumulation
    trainer = run(
        kind, model, tmp_path, tokenizer, max_steps=1, per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=1.0, weight_decay=0.0, max_grad_norm=0.0,
        lr_scheduler_type="constant", gradient_checkpointing=False,
    )  # fmt: skip
    batches = []
    original = trainer.training_step

    def training_step(module, inputs, *rest, **more):
        batches.append({key: value.clone() for key, value in inputs.items() if torch.is_tensor(value)})
        return original(module, inputs, *rest, **more)

    trainer.training_step = training_step
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert len(batches) == accumulation
    given = [
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
        for batch in batches
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ]
    value, _ = oracle.loss(start, given, items=items(given), boundaries=BOUNDARIES, targets=targets_of(start))
    assert history(trainer)[0] == pytest.approx(float(value), rel=1e-5)
    wanted = {name: p for name, p in start.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    for (name, before), gradient in zip(wanted.items(), expected, strict=True):
        rate = 1e-3 if "objective" in name else 1.0
        moved = (before - named[name]) / rate
        gradient = torch.zeros_like(before) if gradient is None else gradient
        torch.testing.assert_close(moved, gradient, rtol=exact, atol=exact / 1000, msg=name)
    computed = trainer.state.log_history[0]["echo/computed_again"]
    assert computed < 0.8 if attention == "sdpa" else computed == 1


@KINDS
def test_parts_are_logged_and_the_adapter_is_plain_at_the_end(kind, tokenizer, tmp_path):
    trainer = run(kind, fresh(), tmp_path, tokenizer, max_steps=6)
    trainer.train()
    for part in ("loss_off", "routed"):
        assert len(history(trainer, f"echo/{part}")) == 6
    assert 0 < sum(value > 0 for value in history(trainer, "echo/routed")) < 6
    assert len(history(trainer, "echo/gate")) == len(history(trainer, "echo/loss_on")) < 6
    assert trainer.model.peft_config["default"].objective == "plain"
    trainer.save_model(tmp_path / "saved")
    stock = PeftModel.from_pretrained(llama(num_hidden_layers=BLOCKS), tmp_path / "saved")
    assert type(stock.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(logits(stock), logits(trainer.model.eval()), rtol=0, atol=1e-5)


@KINDS
@pytest.mark.parametrize("routing", ["step", "sample"])
def test_four_small_batches_equal_one_large(kind, routing, tokenizer, tmp_path):
    found = []
    for size, accumulation in ((4, 1), (1, 4)):
        trainer = run(
            kind, fresh({**RANDOM, "routing": routing}, moved=True), tmp_path, tokenizer, learning_rate=1e-4,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        found.append([history(trainer, key) for key in ("loss", "grad_norm", "echo/routed")])
    large, small = found
    assert large[0] == pytest.approx(small[0], rel=1e-4)
    assert large[1] == pytest.approx(small[1], rel=1e-3)
    assert large[2] == pytest.approx(small[2])
    assert len(set(large[2])) > 1


@KINDS
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, adapter, tokenizer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = run(kind, fresh(adapter=adapter, lora_dropout=0.2), tmp_path / "whole", tokenizer, **saving)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-2"
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORAPLEX"
    assert saved["objective"] == RANDOM
    assert any("echo_up" in key for key in load_file(folder / "adapter_model.safetensors"))
    # it starts elsewhere, with another seed: everything comes from the checkpoint
    other = run(kind, fresh(adapter=adapter, lora_dropout=0.2, seed=99), tmp_path / "other", tokenizer)
    other.train(resume_from_checkpoint=str(folder))
    assert history(other)[-2:] == history(whole)[-2:]
    assert same(other.model.state_dict(), whole.model.state_dict())


@KINDS
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing_changes_nothing(kind, reentrant, tokenizer, tmp_path):
    found = []
    for checkpointing in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        trainer = run(kind, fresh(options()), tmp_path, tokenizer, max_steps=3, **checkpointing)
        trainer.train()
        found.append((history(trainer), history(trainer, "grad_norm")))
    assert found[0] == found[1]


def test_trls_padding_free_batches_pool_each_sequence_for_itself(tokenizer, tmp_path):
    found = []
    for padding_free, signal in ((False, "pooled"), (True, "pooled"), (True, "another")):
        base = llama(num_hidden_layers=BLOCKS)
        base.set_attn_implementation("loraplex_packed")
        model = fresh(options(signal=signal), base=base, moved=True)
        trainer = run("sft", model, tmp_path, tokenizer, padding_free=padding_free, learning_rate=1e-4)
        trainer.train()
        found.append([history(trainer, key) for key in ("loss", "grad_norm", "echo/distillation", "echo/loss_on")])
    by_row, flat, of_another = found
    for one, other in zip(by_row, flat, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    # whose echo it is can be seen in these numbers
    assert of_another[-2:] != [pytest.approx(values, rel=1e-2) for values in flat[-2:]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16(attention, tokenizer, tmp_path):
    """Weights in bfloat16, and autocast: every part of the loss is what float32 gives, as near as bfloat16 comes."""
    found = []
    for kind in ("float32", "autocast", "weights"):
        base = llama(num_hidden_layers=BLOCKS)
        base.set_attn_implementation(attention)
        dtype = torch.bfloat16 if kind == "weights" else torch.float32
        model = fresh(options(), base=base, dtype=dtype, moved=True)
        trainer = run("trainer", model, tmp_path, tokenizer, bf16=kind == "autocast", learning_rate=1e-4)
        trainer.train()
        found.append({part: history(trainer, f"echo/{part}") for part in ("loss_on", "loss_off", "distillation")})
    gains = [[on - off for on, off in zip(parts["loss_on"], parts["loss_off"], strict=True)] for parts in found]
    # what the echo does is above what bfloat16 may change of it
    assert max(map(abs, gains[0])) > 0.04
    for parts, gain in zip(found[1:], gains[1:], strict=True):
        assert parts["loss_off"] == pytest.approx(found[0]["loss_off"], rel=5e-3)
        assert gain == pytest.approx(gains[0], abs=0.02)
        assert parts["distillation"] == pytest.approx(found[0]["distillation"], rel=0.4)


def test_the_networks_learn_at_their_own_rate_and_do_not_decay(tokenizer, tmp_path):
    """As two groups would have it that a scheduler knows: rate 1e-3 at the peak, weight decay 0."""
    ends = []
    for two_groups in (False, True):
        model = fresh(options(learning_rate=5e-3))
        trainer = run("trainer", model, tmp_path, tokenizer, max_steps=4, warmup_steps=2)
        if two_groups:
            networks = list(objective_of(model).parameters())
            others = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in networks)]
            groups = [
                {"params": others, "lr": 1e-2, "weight_decay": 0.1},
                {"params": networks, "lr": 5e-3, "weight_decay": 0.0},
            ]
            trainer.optimizer = torch.optim.AdamW(groups, fused=True)
            objective_of(model).rates = lambda: iter(())
        kept = {}
        trainer.add_callback(_Keeping(kept))
        trainer.train()
        ends.append(kept)
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-6, atol=1e-8, msg=name)


from transformers import TrainerCallback  # noqa: E402


class _Keeping(TrainerCallback):
    def __init__(self, kept):
        self.kept = kept

    def on_step_end(self, args, state, control, **kwargs):
        named = kwargs["model"].named_parameters()
        self.kept.update({name: p.detach().clone() for name, p in named if p.requires_grad})


def test_a_plain_loop_counts_its_own_steps_and_goes_on_from_a_checkpoint(tmp_path):
    def loop(model, steps, optimizer):
        found = []
        for _ in range(steps):
            loss = model(**padded(rows())).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    def sgd(model):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    objective = {**RANDOM, "ramp": 3}
    model = fresh(objective)
    whole = loop(model, 6, sgd(model))
    assert objective_of(model).step == 6
    first = fresh(objective)
    assert loop(first, 3, sgd(first)) == whole[:3]
    first.save_pretrained(tmp_path)
    for again in (
        PeftModel.from_pretrained(llama(num_hidden_layers=BLOCKS), tmp_path, is_trainable=True),
        loraplex.load_adapter(llama(num_hidden_layers=BLOCKS), str(tmp_path), is_trainable=True),
        PeftModel.from_pretrained(llama(num_hidden_layers=BLOCKS), tmp_path, is_trainable=True, low_cpu_mem_usage=True),
    ):
        assert objective_of(again).step == 3
        assert loop(again.train(), 3, sgd(again)) == whole[3:]


def refused(match, call):
    with pytest.raises(UserError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


@KINDS
def test_losses_that_the_trainer_computes_are_refused(kind, tokenizer, tmp_path):
    trainer = run(kind, fresh(), tmp_path, tokenizer, label_smoothing_factor=0.1)
    refused("needs the labels in every training forward.*label_smoothing_factor.*objective to plain", trainer.train)
    trainer = run(kind, fresh(), tmp_path, tokenizer)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()
    refused("needs the labels in every training forward.*compute_loss_func", trainer.train)


def test_dft_is_refused(tokenizer, tmp_path):
    trainer = run("sft", fresh(), tmp_path, tokenizer, loss_type="dft")
    refused("loss_type is 'dft', which reweights the loss of the objective 'echo'", trainer.train)


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO"])
def test_other_losses_of_trl_are_refused(name, tmp_path):
    refused(name, other_loss(name, fresh(), tmp_path).train)


@pytest.mark.parametrize("part", ["model", "blocks", "one linear"])
def test_torch_compile_is_refused(part):
    """It would run one pass compiled and the other not, and give other gradients without a word."""
    model = fresh(options())
    blocks = model.get_base_model().model.layers
    for module in {"model": [model], "blocks": blocks, "one linear": [blocks[0].mlp.up_proj]}[part]:
        module.compile(backend="eager")
    refused("torch.compile.*torch_compile=False.*objective to plain", lambda: model(**padded(rows())))
    with torch.no_grad():
        model.eval()(**padded(rows()))


def test_an_untyped_model_and_the_bare_base_model_are_refused():
    model = fresh(task_type=None)
    refused("'echo' could not act at .*task_type='CAUSAL_LM'", lambda: model(**padded(rows())))
    typed = fresh()
    refused("'echo' could not act at .*call the PEFT model itself", lambda: typed.get_base_model()(**padded(rows())))
    with torch.no_grad():
        typed.get_base_model()(**padded(rows()))


def test_checkpointing_that_transformers_does_not_do_is_refused():
    """Its recomputation would not know in which pass it is."""
    model = fresh(options())
    block = model.get_base_model().model.layers[0]
    forward = block.forward
    block.forward = lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(
        forward, *args, use_reentrant=False, **kwargs
    )
    loss = model(**padded(rows())).loss
    refused("leave gradient checkpointing to transformers", loss.backward)


def test_what_the_batch_or_the_model_lacks_is_named():
    batch = padded(rows())
    refused("has a ramp of 0.5 of all steps.*set ramp to a number", lambda: fresh()(**batch))
    everything = {**batch, "labels": batch["input_ids"]}
    nothing = "no sequence of the batch has a token to pool.*loss_on: completion"
    refused(nothing, lambda: fresh(options())(**everything))
    # a collator masks the first token of every flat sequence: that is no prompt
    for given in (rows(), rows()[:1]):
        learned = flattened([(ids, ids) for ids, _ in given])
        refused(nothing, lambda learned=learned: fresh(options())(**learned))
    # a row without labels has tokens to pool, and no use for them
    first, *rest = rows()
    some = padded([(first[0], first[0]), *((ids, [-100] * len(ids)) for ids, _ in rest)])
    refused(nothing, lambda: fresh(options())(**some))
    alone = padded(rows(((4, 3),)))
    refused(
        "signal is 'another', and the batch has one sequence with an answer",
        lambda: fresh(options(signal="another"))(**alone),
    )
    model = fresh(options())
    refused("needs the labels", lambda: model(input_ids=batch["input_ids"]))
    refused("computes no output for return_dict=False", lambda: model(**batch, return_dict=False))
    refused("computes no output for output_hidden_states", lambda: model(**batch, output_hidden_states=True))
    embedded = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]), "labels": batch["labels"]}
    refused("needs input_ids, and this batch has none", lambda: model(**embedded))
    model.get_base_model().loss_function = lambda logits, labels, vocab_size, **rest: logits.sum()
    refused("has a loss function of its own, <lambda>", lambda: model(**batch))
    model = fresh(options())
    model.get_base_model().lm_head.weight.requires_grad_()
    refused("head that is linear and frozen", lambda: model(**batch))


def test_two_active_adapters_and_one_that_is_off_are_refused():
    model = fresh(options())
    model.add_adapter("other", config())
    model.base_model.set_adapter(["default", "other"])
    refused("trains one adapter.*active are default, other", lambda: model(**padded(rows())))
    model.base_model.set_adapter("other")
    assert model(**padded(rows())).logits is not None
    model.base_model.set_adapter("default")
    with model.disable_adapter():
        refused("trains one adapter that is switched on", lambda: model(**padded(rows())))
    model.delete_adapter("default")
    assert model.base_model.objectives() == {}


def test_the_end_of_training_ends_the_objective_of_what_was_trained(tokenizer, tmp_path):
    model = fresh(options())
    model.add_adapter("other", fresh(options()).peft_config["default"])
    model.set_adapter("default")
    run("trainer", model, tmp_path, tokenizer, max_steps=1).train()
    assert list(model.base_model.objectives()) == ["other"]


def test_a_training_after_the_end_of_the_objective_says_that_it_is_plain(tokenizer, tmp_path):
    trainer = run("trainer", fresh(options()), tmp_path, tokenizer, max_steps=1)
    trainer.train()
    with pytest.warns(UserWarning, match="the objective 'echo' of adapter 'default' ended.*build the model"):
        trainer.train()
    assert not history(trainer, "echo/gate")


def test_a_finished_training_goes_on_as_the_warning_says(tokenizer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    objective = {**RANDOM, "ramp": 3}
    whole = run("trainer", fresh(objective), tmp_path / "whole", tokenizer, **saving)
    whole.train()
    run("trainer", fresh(objective), tmp_path / "half", tokenizer, max_steps=2, **saving).train()
    longer = run("trainer", fresh(objective), tmp_path / "half", tokenizer, **saving)
    longer.train(resume_from_checkpoint=True)
    assert history(longer) == history(whole)


@pytest.mark.parametrize("pool", ["prompt", "answer"])
@pytest.mark.parametrize("signal", ["pooled", "another"])
def test_a_batch_without_answers_is_a_loss_of_zero(pool, signal):
    """Answers that were cut off: TRL keeps such rows."""
    model = fresh(options(pool=pool, signal=signal), moved=True)
    output = model(**padded([(ids, [-100] * len(ids)) for ids, _ in rows()]))
    assert output.loss == 0
    output.loss.backward()


def test_the_ramp_of_no_distillation_needs_no_number_of_steps():
    for change in ({"weight_distillation": 0}, {"probability": 0}):
        model = fresh(options(ramp=0.5, **change))
        model(**padded(rows())).loss.backward()


@pytest.mark.parametrize("injection", ["additive", "output"])
def test_closed_targets_get_nothing_and_all_of_them_closed_is_refused(injection):
    model = fresh(options(injection=injection), moved=True)
    layers = {layer.site: layer for layer in model.modules() if isinstance(layer, SiteLayer)}
    first, *others = targets_of(model)
    layers[first].adapter("default").factors.gate.zero_()
    model(**padded(rows())).loss.backward()
    networks = objective_of(model).networks
    of_first, *of_others = networks.echo_up.grad.split(list(networks.sizes.values()))
    assert torch.count_nonzero(of_first) == 0
    assert all(gradient.any() for gradient in of_others)
    for site in others:
        layers[site].adapter("default").factors.gate.zero_()
    refused("has closed all of its .* target sites; set targets", lambda: model(**padded(rows())))


def test_the_first_step_leaves_frozen_blocks_in_evaluation():
    model = fresh(options())
    block = model.get_base_model().model.layers[2].eval()
    model(**padded(rows()))
    assert not block.training
    assert model.training


def test_a_model_that_runs_a_part_of_its_backbone_is_refused():
    model = echoing(options(targets=[0]), base=opt(), architecture="opt")
    refused("OPTForCausalLM does not run its OPTModel as a whole", lambda: model(**padded(rows())))


def test_an_encoder_decoder_is_refused():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": BLOCKS, "num_heads": 4, "dropout_rate": 0.0}
    base = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))
    model = echoing(options(), base=base, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    refused("T5ForConditionalGeneration has an encoder", lambda: model(**padded(rows())))


def test_two_adapters_train_in_turn_under_checkpointing():
    """Blocks that run again do so for the adapter whose turn it is, and afterwards nobody holds their function."""
    found = []
    for checkpointing in (False, True):
        model = fresh(options())
        model.add_adapter("other", fresh(options()).peft_config["default"])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for name in ("default", "other"):
            model.set_adapter(name)
            model(**padded(rows())).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7)
    base = model.unload()
    functions = [vars(module).get("_gradient_checkpointing_func") for module in base.modules()]
    assert not any(type(function).__name__ == "_Carrying" for function in functions)


def test_a_checkpoint_goes_into_no_other_kind_of_model(tmp_path):
    model = fresh()
    model.save_pretrained(tmp_path / "live")
    plain = get_peft_model(llama(num_hidden_layers=BLOCKS), config())
    refused(
        "holds '.*objective.*', which this model and config do not have",
        lambda: plain.load_adapter(tmp_path / "live", "default"),
    )
    plain.save_pretrained(tmp_path / "plain")
    refused("the adapter file lacks .* tensors", lambda: fresh().load_adapter(tmp_path / "plain", "default"))


def test_the_vocabulary_fits():
    assert max(max(ids) for ids, _ in rows(LENGTHS)) < VOCABULARY
