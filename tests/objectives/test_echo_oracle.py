"""The objective's value and every gradient against its naive form in fp64."""

import pytest
import torch
from tests.extras import FUSED_HEAD
from tests.objectives.echoing import (
    BOUNDARIES,
    echoing,
    flattened,
    gradients,
    items,
    objective_of,
    options,
    padded,
    rows,
    targets_of,
)
from tests.reference import echo as oracle
from tests.tuner.tiny_models import gpt2
from transformers import CohereConfig, CohereForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.models.llama import modeling_llama

from loraplex.objectives.echo_networks import EchoNetworks
from loraplex.seeds import seeded

ADAPTERS = [
    "lora",
    "dora",
    {"name": "lora", "init": "pissa"},
    "tied-tl6",
    "prolora",
    "lora-xs",
    {"factors": "tied", "combine": "magnitude"},
]
CHANGES = [
    {}, {"pool": "last_prompt"}, {"pool": "answer"}, {"pool": "all"}, {"injection": "multiplicative"},
    {"injection": "output"}, {"sources": [2, 6]}, {"signal": "another"}, {"signal": "zeros"}, {"signal": "none"},
    {"weight_on": 0.7, "weight_off": 0.2, "weight_distillation": 0.9, "temperature": 2.0}, {"targets": [0, 3, 5]},
    {"bottleneck": 5, "gate_bias": 1.0},
]  # fmt: skip


def compare(model, batch, given, *, exact=1e-10, **draws):
    total = items(given)
    expected, _ = oracle.loss(
        model, given, items=total, targets=targets_of(model), **{"boundaries": BOUNDARIES, **draws}
    )
    found = model(**batch).loss
    torch.testing.assert_close(found, expected, rtol=exact, atol=exact)
    mine, theirs = gradients(model, found), gradients(model, expected)
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=100 * exact, atol=exact, msg=name)
    return mine


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_every_adapter(adapter):
    model = echoing(adapter=adapter, seed=3)
    given = rows()
    found = compare(model, padded(given), given)
    assert all(gradient.abs().max() > 0 for name, gradient in found.items() if "objective" in name)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_option(adapter, change):
    model = echoing(options(**change), adapter=adapter)
    given = rows()
    compare(model, padded(given), given, boundaries=tuple(change.get("sources", BOUNDARIES)))


@pytest.fixture(autouse=True)
def attention_in_float64(monkeypatch):
    """transformers' eager attention takes its softmax in float32, which hides the tenth digit on some processors."""

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        weights = query @ key.mT * scaling
        weights = (weights if attention_mask is None else weights + attention_mask).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attend)


BOTH = pytest.mark.parametrize(("second_pass", "exact"), [("full", 1e-10), ("auto", 1e-7)], ids=["full", "auto"])
"""One that looks back computes the norms, which Llama rounds to float32, in other rows."""


@BOTH
@pytest.mark.parametrize("layout", ["padded", "left", "packed", "flat", "borders"])
@pytest.mark.parametrize("change", [{}, {"signal": "another"}, {"pool": "last_prompt"}], ids=str)
def test_however_the_batch_is_laid_out(layout, change, second_pass, exact):
    """Sequences are pooled each for itself: as rows, padded on either side, packed by us, or in TRL's one row."""
    from tests.tuner.tiny_models import llama

    base = llama(num_hidden_layers=6, attn_implementation="sdpa")
    base.set_attn_implementation("sdpa")
    padding_free = "auto" if layout == "packed" else False
    model = echoing(options(second_pass=second_pass, **change), base=base, padding_free=padding_free)
    given = rows()
    if layout in ("flat", "borders"):
        batch = flattened(given, borders=layout == "borders")
    else:
        batch = padded(given, "left" if layout == "left" else "right")
    # with padding on the left, the cosines of RoPE are those of later positions, rounded to float32
    compare(model, batch, given, exact=max(exact, 1e-7) if layout == "left" else exact)


@pytest.mark.parametrize("change", [{"signal": "another"}, {"routing": "sample", "probability": 0.5}], ids=str)
def test_padding_at_the_end_of_a_flat_row_is_nobodys_sample(change):
    """`pad_to_multiple_of` of TRL's collator: tokens at position 0 without a label."""
    plain, longer = flattened(rows()), {}
    for name, values in plain.items():
        longer[name] = torch.cat([values, torch.full((1, 4), -100 if name == "labels" else 0)], dim=1)
    for step in range(6):
        losses = []
        for first in (longer, plain):
            model = echoing(options(**change))
            objective_of(model).step = step
            # what the second micro-batch draws depends on how many samples the first one had
            losses.append(torch.stack([model(**batch).loss for batch in (first, plain)]))
        torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)


def test_a_model_with_conv1d_and_biases():
    sizes = {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_inner": 48, "n_positions": 64, "vocab_size": 64}
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    model = echoing(base=base)
    given = rows()
    compare(model, padded(given), given)
    assert gpt2().config.n_layer == 2


def put_fused_head(base):
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))


@BOTH
@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=FUSED_HEAD)], ids=["loss", "fused head"])
@pytest.mark.parametrize("change", [{"logit_scale": 0.25}, {"logit_scale": 1.0}], ids=str)
def test_the_models_logit_scale_is_kept(fused, change, second_pass, exact):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6}
    torch.manual_seed(0)
    base = CohereForCausalLM(CohereConfig(**sizes, num_attention_heads=4, **change))
    model = echoing(options(second_pass=second_pass), base=base)
    given = rows()
    extra = {}
    if fused:
        put_fused_head(model.get_base_model())
        extra = {"fused_lm_head": True}
    compare(model, {**padded(given), **extra}, given, exact=exact)


@FUSED_HEAD
def test_the_fields_that_trl_reads():
    model = echoing()
    given = rows()
    put_fused_head(model.get_base_model())
    output = model(**padded(given), fused_lm_head=True)
    _, parts = oracle.loss(model, given, items=1, boundaries=BOUNDARIES, targets=targets_of(model))
    mask = padded(given)["labels"][:, 1:] != -100
    assert torch.equal(output.label_mask, mask)
    torch.testing.assert_close(output.log_probs[mask], parts["objective"], rtol=1e-10, atol=1e-10)
    assert torch.count_nonzero(output.log_probs[~mask]) == 0
    # entropy and accuracy are those of the pass that is deployed
    with torch.no_grad():
        plain = model.eval()(**padded(given), fused_lm_head=True)
    torch.testing.assert_close(output.entropy, plain.entropy)
    assert torch.equal(output.is_top1, plain.is_top1)


def test_num_items_in_batch_divides_the_loss():
    model, given = echoing(), rows()
    whole = model(**padded(given)).loss * items(given)
    torch.testing.assert_close(model(**padded(given), num_items_in_batch=torch.tensor(37)).loss * 37, whole)
    torch.testing.assert_close(model(**padded(given), num_items_in_batch=37).loss * 37, whole)


@pytest.mark.parametrize("routing", ["step", "sample"])
def test_draws_are_those_of_seed_and_step(routing):
    model = echoing(options(probability=0.5, target_dropout=0.4, routing=routing))
    given, objective = rows(), objective_of(model)
    kinds = set()
    for step in range(6):
        objective.step = step
        size = 1 if routing == "step" else len(given)
        drawn = torch.rand(size, generator=seeded(objective.seed, step, "routing")) < 0.5
        routed = drawn.expand(len(given)).tolist()
        sites = targets_of(model)
        draws = torch.rand(len(sites), generator=seeded(objective.seed, step, "targets"))
        kept = [site for site, draw in zip(sites, draws, strict=True) if draw >= 0.4]
        compare(model, padded(given), given, routed=routed, kept=kept)
        kinds.add(tuple(routed))
    assert len(kinds) > (1 if routing == "step" else 2)


def test_the_ramp_of_the_distillation():
    model, given = echoing(options(ramp=0.5)), rows()
    objective = objective_of(model)
    objective.total = 20
    for step, weight in ((0, 0.0), (5, 0.25), (10, 0.5), (19, 0.5)):
        objective.step = step
        compare(model, padded(given), given, distillation=weight)


def test_the_networks_are_not_rounded_by_autocast():
    networks = EchoNetworks(8, 3, {"a": 2, "b": 3}, 4, gate_bias=0.0, bounded=False, seed=1, identity=False)
    # their squares are beyond float16
    pooled = 1000 * torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(2))
    values, gates = networks(networks.mixed(pooled))
    with torch.autocast("cpu", torch.float16):
        same_values, same_gates = networks(networks.mixed(pooled))
    assert torch.equal(same_gates, gates)
    assert all(torch.equal(same_values[site], value) for site, value in values.items())
