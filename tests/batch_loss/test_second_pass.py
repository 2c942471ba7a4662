"""The second pass that looks back at the first one is the full one, to rounding, gradients included, and cheaper."""

import random

import numpy
import pytest
import torch
from tests.objectives.echoing import BLOCKS, BOUNDARIES, echoing, gradients, objective_of, options, padded, rows
from tests.objectives.test_echo_oracle import compare
from tests.tuner.tiny_models import VOCABULARY, llama
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

EVERY = pytest.mark.parametrize("adapter", ["lora", "dora"])


def model_on_sdpa(adapter="lora", **changed):
    base = llama(num_hidden_layers=BLOCKS)
    base.set_attn_implementation("sdpa")
    fields = {name: changed.pop(name) for name in ("lora_dropout",) if name in changed}
    return echoing(options(**changed), adapter=adapter, base=base, **fields)


def tokens_through_blocks(model):
    model(**padded(rows()))  # the look at the first batch is over
    objective_of(model).report()
    seen = []
    model.get_base_model().model.layers[0].mlp.up_proj.base_layer.register_forward_hook(
        lambda module, args, output: seen.append(output.shape[:-1].numel())
    )
    return seen


@EVERY
@pytest.mark.parametrize("change", [{}, {"injection": "multiplicative"}, {"pool": "all"}, {"signal": "none"}], ids=str)
@pytest.mark.parametrize(
    "lengths", [((5, 3), (2, 6), (7, 1)), ((5, 3), (2, 2), (4, 6)), ((4, 4), (4, 4)), ((1, 1), (9, 2))], ids=str
)
def test_it_equals_the_full_one(adapter, change, lengths):
    found = []
    for kind in ("auto", "full"):
        model = model_on_sdpa(adapter, second_pass=kind, **change)
        given = rows(lengths)
        loss = model(**padded(given)).loss
        found.append((loss.detach(), gradients(model, loss)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-12)
    for name, gradient in found[1][1].items():
        # the model's norms round to float32, the second pass's share of a gradient before or after it is added
        assert (found[0][1][name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


def test_it_equals_the_oracle_when_samples_are_drawn():
    model = model_on_sdpa(routing="sample", probability=0.5)
    given, objective, kinds = rows(), objective_of(model), set()
    from loraplex.seeds import seeded

    for step in range(5):
        objective.step = step
        drawn = (torch.rand(3, generator=seeded(objective.seed, step, "routing")) < 0.5).tolist()
        compare(model, padded(given), given, routed=drawn, boundaries=BOUNDARIES, exact=1e-7)
        kinds.add(tuple(drawn))
    assert len(kinds) > 2


def test_it_computes_answers_only():
    model = model_on_sdpa()
    seen = tokens_through_blocks(model)
    model(**padded(rows()))
    # 5 + 3, 2 + 2 and 4 + 6 tokens; then the positions that predict 3, 2 and 6 of them
    assert seen == [22, 11]
    assert objective_of(model).report()["computed_again"] == 0.5


@pytest.mark.parametrize("why", ["option", "dropout", "checkpointing", "flat"])
def test_where_it_would_not_be_exact_the_whole_is_computed(why):
    changed = {"second_pass": "full"} if why == "option" else {"lora_dropout": 0.1} if why == "dropout" else {}
    model = model_on_sdpa(**changed)
    seen = tokens_through_blocks(model)
    batch = padded(rows())
    if why == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if why == "flat":
        from tests.objectives.echoing import flattened

        batch = flattened(rows())
    model(**batch)
    assert seen == [22, 22]
    assert objective_of(model).report()["computed_again"] == 1


@pytest.mark.parametrize("family", ["nemotron", "diffllama"])
def test_models_whose_attention_cannot_look_back_compute_the_whole(family):
    """Nemotron keeps keyword arguments from its attention, DiffLlama attends twice in one module."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = CONFIG_MAPPING[family](
        vocab_size=VOCABULARY, num_hidden_layers=BLOCKS, head_dim=8, attention_dropout=0.0, pad_token_id=0, **sizes
    )
    found = []
    for kind in ("auto", "full"):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
        model = echoing(options(second_pass=kind), base=base)
        loss = model(**padded(rows())).loss
        found.append((loss.detach(), gradients(model, loss)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-12)
    assert all(torch.equal(found[0][1][name], gradient) for name, gradient in found[1][1].items())


def test_equal_lengths_without_padding():
    model, given = model_on_sdpa(), rows(((4, 4), (4, 4)))
    seen = tokens_through_blocks(model)
    compare(model, padded(given), given, exact=1e-7)
    assert seen[:2] == [16, 8]


class Dropping(torch.nn.Module):
    """A module whose training forward draws, in a way that no list of dropout modules tells."""

    def __init__(self, kind, inner):
        super().__init__()
        self.kind, self.inner = kind, inner
        self.module = {"Dropout1d": torch.nn.Dropout1d, "AlphaDropout": torch.nn.AlphaDropout}.get(kind)
        self.module = None if self.module is None else self.module(0.4)

    def forward(self, *args, **kwargs):
        y = self.inner(*args, **kwargs)
        if not self.training:
            return y
        if self.module is not None:
            return self.module(y)
        if self.kind == "functional":
            return torch.nn.functional.dropout(y, 0.4)
        if self.kind == "python":
            return y * (1 + random.random())
        return y * (1 + numpy.random.rand())


@pytest.mark.parametrize("kind", ["Dropout1d", "AlphaDropout", "functional", "python", "numpy"])
def test_a_pass_that_draws_is_seen_while_it_runs(kind):
    """The second pass then computes everything, with draws of its own."""
    model = model_on_sdpa()
    block = model.get_base_model().model.layers[1]
    block.mlp = Dropping(kind, block.mlp).train()
    seen = tokens_through_blocks(model)
    model(**padded(rows()))
    assert seen == [22, 22]
    assert objective_of(model).report()["computed_again"] == 1


def test_dropout_that_is_switched_on_later_is_seen_too():
    model = model_on_sdpa()
    seen = tokens_through_blocks(model)
    model(**padded(rows()))
    block = model.get_base_model().model.layers[1]
    block.mlp = Dropping("functional", block.mlp).train()
    model(**padded(rows()))
    assert seen == [22, 11, 22, 22]
