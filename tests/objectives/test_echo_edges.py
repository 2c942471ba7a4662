"""Where the objective cannot act it says so at once, in one line; at the edges of what it can, nothing surprises."""

import pytest
import torch
from peft import get_peft_model
from tests.extras import TRL
from tests.objectives.echo_trainers import KINDS, fresh, run
from tests.objectives.echoing import BLOCKS, echoing, flattened, objective_of, options, padded, rows, targets_of
from tests.tuner.tiny_models import VOCABULARY, config, llama, opt
from transformers import T5Config, T5ForConditionalGeneration

from loraplex import UserError
from loraplex.tuner.layer import SiteLayer


def refused(match, call):
    with pytest.raises(UserError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


@KINDS
def test_losses_that_the_trainer_computes_are_refused(kind, tmp_path):
    trainer = run(kind, fresh(), tmp_path, label_smoothing_factor=0.1)
    refused("needs the labels in every training forward.*label_smoothing_factor.*objective to plain", trainer.train)
    trainer = run(kind, fresh(), tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()
    refused("needs the labels in every training forward.*compute_loss_func", trainer.train)


@TRL
def test_dft_is_refused(tmp_path):
    trainer = run("sft", fresh(), tmp_path, loss_type="dft")
    refused("loss_type is 'dft', which reweights the loss of the objective 'echo'", trainer.train)


@TRL
@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO"])
def test_other_losses_of_trl_are_refused(name, tmp_path):
    from tests.tuner.trl_trainers import other_loss

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
    refused("head that is linear, frozen and without hooks", lambda: model(**batch))


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
