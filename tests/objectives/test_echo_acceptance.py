"""The six acceptance tests of the method: what is deployed is plain LoRA or DoRA, and nothing leaks."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.objectives.echoing import BLOCKS, echoing, gradients, objective_of, options, padded, rows, targets_of
from tests.tuner.tiny_models import config, llama, logits, same

from loraplex import UserError
from loraplex.kernels.distilled_head import Weights
from loraplex.objectives.passes import Pass
from loraplex.objectives.plain import Plain

EVERY = pytest.mark.parametrize("adapter", ["lora", "dora"])


def base():
    return llama(num_hidden_layers=BLOCKS)


@EVERY
def test_1_after_detach_keys_count_and_file_are_those_of_the_plain_adapter(adapter, tmp_path):
    model = echoing(adapter=adapter, dtype=torch.float32)
    plain = get_peft_model(base(), config(adapter=adapter))
    assert model.state_dict().keys() != plain.state_dict().keys()
    model.base_model.detach_objective()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "plain"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    ours, theirs = ((tmp_path / name / "adapter_config.json").read_text() for name in ("ours", "plain"))
    assert ours == theirs


@EVERY
def test_2_stock_peft_computes_the_plain_pass(adapter, tmp_path):
    model = echoing(adapter=adapter, dtype=torch.float32)
    expected = logits(model.eval())
    model.train().base_model.detach_objective()
    assert torch.equal(logits(model.eval()), expected)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(base(), tmp_path)
    assert type(stock.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(logits(stock), expected, rtol=0, atol=1e-5)


@EVERY
@pytest.mark.parametrize("form", ["additive", "multiplicative", "output"])
def test_3_without_projection_the_passes_are_equal_bit_for_bit(adapter, form):
    model = echoing(options(injection=form), adapter=adapter, dtype=torch.float32)
    objective = objective_of(model)
    with torch.no_grad():
        objective.networks.echo_up.zero_()
    seen = capture(objective)
    model(**padded(rows()))
    on, off = seen
    assert torch.equal(on, off)
    with torch.no_grad():
        objective.networks.echo_up.add_(0.5)
    model(**padded(rows()))
    assert not torch.equal(on, seen[2])


def capture(objective):
    """Collect the hidden states of both passes, teacher first, as the objective hands them to the head."""
    seen, original = [], objective._two_passes

    def two_passes(batch, on, off, routed, weights):
        seen.extend([on.detach(), off.detach()])
        return original(batch, on, off, routed, weights)

    objective._two_passes = two_passes
    return seen


@EVERY
def test_4_nothing_of_it_runs_in_evaluation(adapter, monkeypatch):
    model = echoing(adapter=adapter, dtype=torch.float32)
    plain = copy.deepcopy(model)
    plain.base_model.detach_objective()
    objective = objective_of(model)

    def refuse(*args, **kwargs):
        raise AssertionError("called")

    for module in (objective, *objective.modules()):
        module.register_forward_pre_hook(refuse)
    monkeypatch.setattr(objective, "loss", refuse)
    for module in model.modules():
        port = getattr(module, "input", None)
        if port is not None:
            monkeypatch.setattr(port, "change", refuse)
    assert not any(block._forward_hooks for block in model.get_base_model().model.layers)
    batch = padded(rows())
    model.eval()
    with torch.no_grad():
        found = model(**batch)
    torch.testing.assert_close(found.loss, plain.eval()(**batch).loss, rtol=0, atol=0)
    model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=2)
    with pytest.raises(AssertionError, match="called"):
        model.train()(**batch)


@EVERY
def test_5_shallow_adapters_learn_through_the_echo_and_its_sources_do_not(adapter):
    """With the plain pass weightless every gradient comes through the second pass; the echo's is cut at the pooling."""
    model = echoing(options(weight_off=0.0, weight_distillation=0.0, weight_on=1.0), adapter=adapter)
    found = gradients(model, model(**padded(rows())).loss)
    for site in targets_of(model):
        for name in ("lora_A", "lora_B"):
            key = next(key for key in found if f"{site}.loraplex_adapters" in key and key.endswith(name))
            assert found[key].abs().max() > 0, key
    # only through the echo: its values as leaves, and whatever the pooled states depend on
    objective, seen = objective_of(model), []
    original = objective.networks.mixed

    def mixed(pooled):
        seen.append(pooled)
        return original(pooled)

    objective.networks.mixed = mixed
    model(**padded(rows()))
    assert seen[0].abs().max() > 0
    assert not seen[0].requires_grad


@EVERY
@pytest.mark.parametrize("pool", ["prompt", "last_prompt"])
def test_6_an_answer_token_changes_nothing_before_it_in_either_pass(adapter, pool):
    model = echoing(options(pool=pool), adapter=adapter)
    seen = capture(objective_of(model))
    given = rows(((5, 6),))
    model(**padded(given))
    ids, labels = list(given[0][0]), list(given[0][1])
    place = 8
    ids[place] = labels[place] = 2 + (ids[place] + 1) % 50
    model(**padded([(ids, labels)]))
    before = place - 5 + 1  # predicting positions 4..9; those that have not seen token 8
    for first, second in zip(seen[:2], seen[2:], strict=True):
        assert torch.equal(first[:before], second[:before])
        assert not torch.equal(first[before:], second[before:])


def test_6_pooling_answers_does_leak():
    """The test above can fail: with the answers pooled every position of the second pass knows them."""
    model = echoing(options(pool="answer"))
    seen = capture(objective_of(model))
    given = rows(((5, 6),))
    model(**padded(given))
    ids, labels = list(given[0][0]), list(given[0][1])
    ids[8] = labels[8] = 2 + (ids[8] + 1) % 50
    model(**padded([(ids, labels)]))
    assert not torch.equal(seen[0][:1], seen[2][:1])
    assert torch.equal(seen[1][:4], seen[3][:4])


def test_a_second_turn_does_not_leak_an_earlier_answer():
    """Prompts end at the first answer: a later turn of the conversation has seen it."""
    model = echoing()
    seen = capture(objective_of(model))
    ids = rows(((8, 4),))[0][0]
    labels = [-100, -100, -100, ids[3], ids[4], -100, -100, -100, ids[8], ids[9], -100, -100]
    model(**padded([(ids, labels)]))
    changed = [*ids[:4], 2 + (ids[4] + 1) % 50, *ids[5:]]
    model(**padded([(changed, [*labels[:4], changed[4], *labels[5:]])]))
    assert torch.equal(seen[0][:2], seen[2][:2])


@EVERY
def test_detaching_leaves_nothing_behind(adapter):
    model = echoing(adapter=adapter, dtype=torch.float32)
    plain = get_peft_model(base(), config(adapter=adapter)).train()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "objective" not in k})
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**padded(rows())).loss.backward()
    model.base_model.detach_objective()
    model.zero_grad()
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    losses = []
    for each in (model, plain):
        each(**padded(rows())).loss.backward()
        losses.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert same(*losses)
    assert not any(getattr(module, "input", None) for module in model.modules())
    assert not [
        m
        for m in model.modules()
        if "loraplex.objectives" in type(m.__dict__.get("_gradient_checkpointing_func")).__module__
    ]
    assert model.base_model.objectives() == {}
    assert model.peft_config["default"].objective == Plain()
    model.base_model.detach_objective()


def test_weights_and_passes_are_plain_data():
    assert Weights(0.5, 0.5, 0.5) == Weights(0.5, 0.5, 0.5, 1.0)
    assert Pass().values == {}


def test_an_echo_of_zeros_is_two_passes_without_an_echo():
    """Two controls that are one by construction: zeros project to zero."""
    found = []
    for signal in ("zeros", "none"):
        model = echoing(options(signal=signal), lora_dropout=0.3, seed=3, moved=False, dtype=torch.float32)
        torch.manual_seed(0)
        found.append(model(**padded(rows())).loss)
    assert torch.equal(*found)


def test_a_fixed_random_vector_is_the_same_for_every_batch_and_sample():
    model = echoing(options(signal="random"))
    objective, seen = objective_of(model), []
    original = objective._signal
    objective._signal = lambda batch, pool: seen.append(original(batch, pool)) or seen[-1]
    model(**padded(rows()))
    model(**padded(rows(seed=9)))
    assert torch.equal(seen[0], seen[1])
    assert all(torch.equal(row, seen[0][0]) for row in seen[0])
    assert seen[0].abs().max() > 0


def test_the_networks_have_as_many_parameters_as_their_formula_says():
    model = echoing(options(bottleneck=7))
    objective = objective_of(model)
    sites = len(targets_of(model))
    expected = 32 * 7 + sites * (4 * 7 + 7 + 1) + 3 + 32
    assert sum(p.numel() for p in objective.parameters()) == expected
    assert sites == 2 * 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": "answers"}, "pool is 'answers': choose prompt, last_prompt, answer, all.*'answer'"),
        ({"pool": "answer", "weight_off": 0}, "shows the echo the answer, and weight_off is 0.*set weight_off above 0"),
        ({"weight_on": 0, "weight_off": 0}, "both 0: nothing would learn"),
        ({"probability": 1.5}, "probability is 1.5: give a number from 0 to 1"),
        ({"temperature": 0}, "temperature is 0: give a number above 0"),
        ({"ramp": -1}, "ramp is -1: give a number of at least 0"),
        ({"sources": 0}, "sources is 0: give a number of at least 1"),
        ({"sources": [0]}, "sources is .0.: give a list of whole numbers of at least 1"),
        ({"sources": [7]}, "sources names boundary 7, but the model has 6 blocks"),
        ({"targets": [6]}, "targets names block 6, but the model has blocks 0 to 5"),
        ({"targets": []}, "targets is ..: give a list"),
        ({"bottleneck": 0}, "bottleneck is 0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(change, message):
    with pytest.raises(UserError, match=message):
        echoing(options(**change))


def test_a_model_without_a_target_is_refused():
    with pytest.raises(UserError, match=r"no target: .* in the first third of 2 blocks; set targets"):
        echoing(base=llama())


def test_it_needs_a_peft_model():
    from peft import inject_adapter_in_model

    with pytest.raises(UserError, match="needs a PeftModel, because the two passes of its objective"):
        inject_adapter_in_model(config(objective="echo"), base())


def test_copies_and_pickles_are_on_their_own():
    import pickle

    model = echoing(moved=True)
    batch = padded(rows())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**batch).loss, model(**batch).loss)
        twin.base_model.detach_objective()
        assert model(**batch).loss.isfinite()
        assert not any(getattr(module, "input", None) for module in twin.modules())
