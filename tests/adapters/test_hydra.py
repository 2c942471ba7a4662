"""HydraLoRA where it is LoRA, how it starts, its dropout, its gates, and how it is run."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.adapters.large_shapes import count
from tests.contract.sites import build
from tests.data.topics import prompts
from tests.extras import SKLEARN
from tests.tuner.tiny_models import adapted, config, gradients, llama, logits, move, tokens
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import loraplex
from loraplex import Adapter, AdapterConfig, Add, LoRA, Magnitude, UserError
from loraplex.adapters.hydra import Heads, Route
from loraplex.kernels.routed import softmax_gates

ARCHITECTURES = pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "bert"])


def site(**fields):
    return build(Adapter(Heads(heads=3), Route(**fields.pop("route", {}))), 7, 5, 2, **fields)


def test_one_head_is_lora():
    ours, theirs = build(Adapter(Heads(heads=1), Route()), 7, 5, 2), build(Adapter(LoRA(), Add()), 7, 5, 2)
    x, factors = torch.randn(6, 7, dtype=torch.float64), theirs.adapter.factors
    with torch.no_grad():
        factors.lora_A.copy_(ours.adapter.factors.lora_A)
        factors.lora_B.copy_(ours.adapter.factors.lora_B)
    torch.testing.assert_close(ours.forward(x), theirs.forward(x), rtol=1e-14, atol=1e-14)


def test_equal_routing_weights_are_the_mean_of_the_heads():
    one = site()
    with torch.no_grad():
        one.adapter.combine.lora_route.zero_()
    factors, x = one.adapter.factors, torch.randn(6, 7, dtype=torch.float64)
    mean = factors.lora_B.view(5, 3, 2).mean(1)
    expected = one.base(x) + factors.scale * x @ factors.lora_A.T @ mean.T
    torch.testing.assert_close(one.forward(x), expected, rtol=1e-13, atol=1e-13)


def test_the_start_of_the_paper():
    one = build(Adapter(Heads(), Route()), 400, 60, 3, perturb=False, dtype=torch.float32)
    a, route = one.adapter.factors.lora_A, one.adapter.combine.lora_route
    for parameter in (a, route):
        assert 0.9 / 20 < parameter.abs().max() <= 1 / 20
    assert not one.adapter.factors.lora_B.any()
    # drawn apart: a router that is a part of A would see the same features
    assert not torch.equal(a[:3], route[:3])


def test_heads_do_not_stay_equal():
    torch.manual_seed(0)
    one = site(perturb=False, dtype=torch.float32)
    x, target = torch.randn(64, 7), torch.randn(64, 5)
    optimizer = torch.optim.SGD(one.adapter.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        F.mse_loss(one.forward(x), target).backward()
        optimizer.step()
    first, second, third = one.adapter.factors.lora_B.view(5, 3, 2).unbind(1)
    assert min((first - second).norm(), (second - third).norm(), (first - third).norm()) > 0.01 * first.norm()


def test_the_scale_is_that_of_lora():
    assert site().adapter.factors.scale == 5 / 2


@pytest.mark.parametrize("per_head", [False, True], ids=["one mask", "a mask per head"])
@pytest.mark.parametrize("path", ["forward", "sum_of_deltas"])
def test_dropout_with_fixed_masks(per_head, path):
    """The router reads x itself; the masks are those that torch draws, one, or one per head in their order."""
    one = site(route={"dropout_per_head": per_head}, dropout=0.4)
    one.adapter.train()
    x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    ours = getattr(one, path)(x)
    torch.manual_seed(5)
    drawn = [F.dropout(torch.ones_like(x), 0.4) for _ in range(3 if per_head else 1)]
    factors, router = one.adapter.factors, one.adapter.combine.lora_route
    gates = (x @ router.T).softmax(-1)
    theirs = one.base(x)
    for head in range(3):
        b = factors.lora_B[:, 2 * head : 2 * head + 2]
        masked = x * drawn[head if per_head else 0]
        theirs = theirs + factors.scale * gates[..., head, None] * (masked @ factors.lora_A.T @ b.T)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    wanted = [x, *one.adapter.parameters()]
    upstream = torch.randn_like(ours)
    for mine, reference in zip(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(theirs, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-12)


def test_masks_per_head_are_off_outside_training():
    one = site(route={"dropout_per_head": True}, dropout=0.4)
    one.adapter.eval()
    x = torch.randn(6, 7, dtype=torch.float64)
    torch.testing.assert_close(one.forward(x), one.reference(x), rtol=1e-12, atol=1e-12)


def test_top_k_leaves_the_other_heads_alone():
    one = site(route={"top_k": 1})
    one.forward(torch.tensor([[1.0, 2, 3, 4, 5, 6, 7]], dtype=torch.float64)).sum().backward()
    touched = one.adapter.factors.lora_B.grad.view(5, 3, 2).abs().sum((0, 2)) > 0
    assert touched.sum() == 1


def test_balancing_evens_the_loads():
    """Heads and data that prefer one head: with the weight the loads come closer to even ones, without they do not."""
    spread = {}
    for balance in (0.0, 100.0):
        torch.manual_seed(0)
        one = site(route={"balance": balance})
        x, target = torch.randn(64, 7, dtype=torch.float64) + 1, torch.randn(64, 5, dtype=torch.float64)
        optimizer = torch.optim.SGD([one.adapter.combine.lora_route], lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            F.mse_loss(one.forward(x), target).backward()
            optimizer.step()
        loads = softmax_gates(x @ one.adapter.combine.lora_route.T).mean(0)
        spread[balance] = (loads.max() - loads.min()).item()
    assert spread[100.0] < 0.05 < 0.15 < spread[0.0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_balancing_under_gradient_checkpointing(reentrant):
    hydra = {"name": "hydra", "heads": 3, "balance": 1.0}
    plain, checkpointed, without = (
        adapted(adapter=hydra),
        adapted(adapter=hydra),
        adapted(adapter={**hydra, "balance": 0}),
    )
    checkpointed.train()
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected, found = gradients(plain.train()), gradients(checkpointed)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-7, msg=key)
    routes = [key for key in expected if key.endswith("lora_route")]
    other = gradients(without.train())
    assert routes
    assert not any(torch.allclose(expected[key], other[key], rtol=1e-3) for key in routes)


def test_fixed_gates_leave_a_pair():
    one, gates = site(), torch.tensor([0.5, 0.2, 0.3])
    one.adapter.factors.gate[1] = 0
    a, b = one.adapter.combine.collapsed(one.adapter.factors, gates)
    factors = one.adapter.factors
    heads = factors.lora_B.view(5, 3, 2) * factors.gate
    expected = factors.scale * sum(g * heads[:, i] for i, g in enumerate(gates.double()))
    torch.testing.assert_close(b, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(a, factors.lora_A)
    other = build(Adapter(LoRA(), Add()), 7, 5, 2).adapter
    with pytest.raises(UserError, match="no gates over heads"):
        other.combine.collapsed(other.factors, gates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: Heads(heads=0), r"heads is 0: give a whole number of at least 1"),
        (lambda: Heads(heads=True), r"heads is True"),
        (lambda: Route(top_k=0), r"top_k is 0"),
        (lambda: Route(balance=-1), r"balance is -1: give a weight of at least 0"),
        (lambda: Route(balance=0.1, router="frozen"), r"balance is 0\.1, but the router is frozen"),
        (lambda: build(Adapter(Heads(heads=2), Route(top_k=3)), 7, 5, 2), r"top_k is 3, but layers\.0\.site has 2"),
        (lambda: Adapter(Heads(), Magnitude()), r"'magnitude' needs a weight change that is the same for every token"),
        (lambda: Adapter(Heads(), Add()), r"'add' needs"),
        (lambda: Adapter(LoRA(), Route()), r"'route' needs several heads per site, which 'lora' does not offer"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        options()


def test_counts_on_llama_2_7b():
    """The paper's setting, r = 4 and four heads on the MLP; its own figure leaves the router out."""
    d, wide, r, heads = 4096, 11008, 4, 4
    shapes = [(d, wide), (d, wide), (wide, d)]
    expected = 32 * sum(r * i + heads * r * o + heads * i for i, o in shapes)
    targets = ["gate_proj", "up_proj", "down_proj"]
    assert count({"name": "hydra", "heads": heads}, r, targets) == expected


@ARCHITECTURES
def test_any_architecture_starts_as_its_base_and_reloads(architecture, tmp_path):
    from tests.tuner.tiny_models import build as base

    model = get_peft_model(base(architecture), config(architecture, adapter="hydra")).eval()
    assert torch.equal(logits(model), logits(base(architecture)))
    expected = logits(move(model))
    assert not torch.equal(expected, logits(base(architecture)))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loraplex.load_adapter(base(architecture), str(tmp_path))), expected)


def test_transformers_loads_it_natively(tmp_path):
    model = adapted(adapter="hydra")
    model.save_pretrained(tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "base")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    native.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(native), logits(model), rtol=0, atol=1e-6)


def test_rows_of_mixed_length_equal_single_rows():
    model = adapted(adapter="hydra")
    rows = [tokens(1, length, seed=length) for length in (3, 9, 6)]
    ids = torch.cat([F.pad(row, (0, 9 - row.shape[1])) for row in rows])
    mask = torch.cat([F.pad(torch.ones_like(row), (0, 9 - row.shape[1])) for row in rows])
    together = logits(model, ids, attention_mask=mask)
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(found[: row.shape[1]], logits(model, row)[0], rtol=0, atol=1e-6)


def test_training_without_padding_has_the_gradients_of_padded_batches():
    ids = tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[1, 7:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    found = []
    for padding_free in (False, True):
        model = adapted(adapter="hydra", padding_free=padding_free).train()
        base = model.get_base_model()
        base.set_attn_implementation("sdpa")
        model(**batch, num_items_in_batch=torch.tensor(18)).loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-4, atol=1e-7, msg=key)


def test_beside_other_adapters_on_one_site():
    model = adapted(adapter="hydra")
    alone = logits(model)
    model.add_adapter("other", config(adapter="dora", target_modules=["q_proj", "down_proj"]))
    model.set_adapter("other")
    move(model, seed=6)
    other = logits(model)
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        y0 = layer.base_layer(x)
        change = layer.get_delta_weight("other")
        routed = layer.adapter("default").output(x, layer.frozen.matrix(), layer.frozen.bias()) - y0
        torch.testing.assert_close(layer(x), y0 + x @ change.T + routed, rtol=0, atol=1e-6)
    # a batch whose rows have one adapter each
    model.eval()
    names = ["default", "other"]
    mixed = logits(model, adapter_names=names)
    for row, expected in enumerate((alone, other)):
        torch.testing.assert_close(mixed[row], expected[row], rtol=0, atol=1e-6)


def test_there_is_no_change_of_the_weight():
    model = adapted(adapter="hydra")
    with pytest.raises(UserError, match="another matrix for every token"):
        model.base_model.model.model.layers[0].mlp.up_proj.get_delta_weight("default")


def test_closed_ranks_get_no_gradient():
    model = adapted(adapter="hydra").train()
    name = "model.layers.0.mlp.up_proj"
    model.base_model.close_ranks("default", name, [1, 3])
    found = gradients(model)
    heads = found[f"base_model.model.{name}.loraplex_adapters.default.factors.lora_B"].view(48, 4, 4)
    assert not heads[..., [1, 3]].any()
    assert heads[..., [0, 2]].abs().sum((0, 2)).all()


@pytest.mark.parametrize("router", ["frozen", "uniform"])
def test_a_router_that_does_not_learn_is_no_parameter(router: str, tmp_path: Path) -> None:
    adapter = {"name": "hydra", "heads": 3, "router": router}
    options = AdapterConfig(adapter=adapter, r=2, target_modules=["q_proj"], init_lora_weights=False, seed=0)
    model = get_peft_model(llama(), options)
    layer = next(model.base_model.site_layers())
    assert not any("lora_route" in name for name, _ in model.named_parameters())
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    gates = softmax_gates(x @ layer.adapter("default").combine.lora_route.T)
    assert torch.allclose(gates, torch.full((5, 3), 1 / 3)) == (router == "uniform")
    layer(x).sum().backward()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


@SKLEARN
def test_heads_left_open_need_training_rows() -> None:
    left_open = AdapterConfig(adapter={"name": "hydra", "heads": "auto"}, target_modules=["q_proj"])
    with pytest.raises(UserError, match="heads is 'auto' without training rows: give a number"):
        get_peft_model(llama(), left_open)
    texts, _ = prompts(3)
    found = Heads(heads="auto").resolve_from_data(lambda: texts, 0)
    assert found is not None
    assert found.options == Heads(heads=3)
    assert Heads(heads=2).resolve_from_data(list, 0) is None


HYDRA = {"name": "hydra", "heads": 3, "balance": 0.5}


def balance_gradients(scaled):
    """The gradients of the routers that come from the balance alone: with it, less those without."""
    found = []
    for balance in (HYDRA["balance"], 0.0):
        model = adapted(adapter={**HYDRA, "balance": balance}).train()
        model.zero_grad()
        scaled(model)
        found.append({key: p.grad for key, p in model.named_parameters() if key.endswith("lora_route")})
    return {key: found[0][key] - gradient for key, gradient in found[1].items()}


def ask(model, factor=1.0, **more):
    ids = tokens()
    return (model(input_ids=ids, labels=ids, **more).loss * factor).backward()


@pytest.mark.parametrize("factor", [1 / 4, 65536.0])
def test_the_balance_is_scaled_like_the_loss(factor):
    """By accumulation, which divides it, and by a gradient scaler, which multiplies it."""
    expected, found = balance_gradients(ask), balance_gradients(lambda model: ask(model, factor))
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[key], gradient * factor, rtol=1e-3, atol=1e-6 * factor)


def test_under_a_trainer_a_batch_counts_with_its_part_of_the_targets():
    """Two batches of one optimizer step, their losses divided by the targets of both: the mean of the two."""
    ids = tokens()
    targets = ids[:, 1:].numel()

    def both(model):
        for _ in range(2):
            ask(model, num_items_in_batch=torch.tensor(2 * targets))

    expected, found = balance_gradients(ask), balance_gradients(both)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-6)


def test_a_loss_that_is_computed_out_of_the_logits_is_refused():
    model = adapted(adapter=HYDRA).train()
    with pytest.raises(UserError, match="balance cannot be scaled"):
        model(input_ids=tokens())
    adapted(adapter={**HYDRA, "balance": 0}).train()(input_ids=tokens())
