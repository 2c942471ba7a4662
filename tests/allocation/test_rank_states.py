"""Ranks that are closed stand still, and what an optimizer keeps of those that open again."""

import pytest
import torch
from tests.allocation.moving import MOVING, adapted, step
from tests.allocation.scenes import batches

from loraplex import HeteroLoRA, start_allocation


def test_the_magnitude_of_a_site_that_is_off_stays() -> None:
    """Also on the plain path, where its gradient is zeros and decay would move it."""
    model = adapted(HeteroLoRA(batches=2), adapter="dora").train()
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05, weight_decay=0.5)
    start_allocation(model, batches(), total_steps=9)
    layers = list(model.base_model.site_layers())
    for layer in layers:
        layer.base_layer.register_forward_hook(lambda module, inputs, output: None)
    before = [layer.adapter("default").combine.lora_magnitude_vector.detach().clone() for layer in layers]
    for batch in batches():
        made.zero_grad()
        model(**batch).loss.backward()
        made.step()
    moved = [
        not torch.equal(layer.adapter("default").combine.lora_magnitude_vector, kept)
        for layer, kept in zip(layers, before, strict=True)
    ]
    assert moved == [not layer.adapter("default").factors.closed for layer in layers]
    assert 0 < sum(moved) < 14


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adagrad"])
def test_closed_ranks_do_not_move_and_start_anew(optimizer: str) -> None:
    settings = {"AdamW": {"weight_decay": 0.3}, "SGD": {"momentum": 0.9, "weight_decay": 0.1}, "Adagrad": {}}
    model = adapted(MOVING).train()
    made = getattr(torch.optim, optimizer)(
        [p for p in model.parameters() if p.requires_grad], 0.05, **settings[optimizer]
    )
    drive = start_allocation(model, batches(), total_steps=7)
    layers = {layer.site: layer.adapter("default").factors for layer in model.base_model.site_layers()}
    reopened = 0
    for done, batch in enumerate([*batches(), *batches()]):
        made.zero_grad()
        model(**batch).loss.backward()
        gates = {site: factors.gate.clone() for site, factors in layers.items()}
        before = {site: (f.lora_A.detach().clone(), f.lora_B.detach().clone()) for site, f in layers.items()}
        made.step()
        for site, factors in layers.items():
            closed, opened = gates[site] == 0, gates[site] == 1
            assert torch.equal(factors.lora_A[closed], before[site][0][closed])
            assert torch.equal(factors.lora_B[:, closed], before[site][1][:, closed])
            # a site may be off altogether
            assert not opened.any() or not torch.equal(factors.lora_B[:, opened], before[site][1][:, opened])
        output = model(**batch).logits.detach()
        drive.step()
        newly = {site: (f.gate == 1) & (gates[site] == 0) for site, f in layers.items()}
        reopened += sum(int(found.sum()) for found in newly.values())
        if done + 1 in (2, 4):
            # what was pruned changes the output, what was given does not: given alone leaves it as it is
            for site, factors in layers.items():
                assert not factors.lora_B[:, newly[site]].any()
        else:
            torch.testing.assert_close(model(**batch).logits.detach(), output, rtol=0, atol=0)
    assert reopened == 6


def test_moments_of_a_rank_that_opens_again_are_forgotten() -> None:
    model = adapted(HeteroLoRA(batches=2, warm_up=1)).train()
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    drive = start_allocation(model, batches(), total_steps=9)
    factors = next(model.base_model.site_layers()).adapter("default").factors

    for _ in range(2):
        step(model, made)
    assert drive.done == 0
    factors.gate[1] = 0
    step(model, made)
    kept = made.state[factors.lora_A]["exp_avg"].clone()
    assert kept[1].any()
    factors.gate[1] = 1
    before = made.state[factors.lora_A]["exp_avg"].clone()
    step(model, made)
    gradient = factors.lora_A.grad
    found = made.state[factors.lora_A]["exp_avg"]
    torch.testing.assert_close(found[1], 0.1 * gradient[1])
    torch.testing.assert_close(found[0], 0.9 * before[0] + 0.1 * gradient[0])


def test_the_second_moment_of_an_opened_rank_is_that_of_its_neighbors() -> None:
    """At 0 and with the others' number of steps, it would let the rank run several times faster than them."""
    model = adapted(HeteroLoRA(batches=2, warm_up=1)).train()
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    start_allocation(model, batches(), total_steps=9)
    factors = next(model.base_model.site_layers()).adapter("default").factors

    factors.gate[1] = 0
    for _ in range(20):
        step(model, made)
    factors.gate[1] = 1
    before = made.state[factors.lora_B]["exp_avg_sq"].clone()
    assert not before[:, 1].any()
    step(model, made)
    expected = 0.999 * before[:, [0, 2, 3]].mean(1) + 0.001 * factors.lora_B.grad[:, 1] ** 2
    torch.testing.assert_close(made.state[factors.lora_B]["exp_avg_sq"][:, 1], expected)


def test_a_site_that_comes_back_starts_with_an_empty_state() -> None:
    model = adapted(HeteroLoRA(batches=2, warm_up=1)).train()
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05, weight_decay=0)
    start_allocation(model, batches(), total_steps=9)
    factors = next(model.base_model.site_layers()).adapter("default").factors

    step(model, made)
    factors.gate.zero_()
    step(model, made)
    factors.gate.fill_(1)
    before = factors.lora_B.detach().clone()
    step(model, made)
    # the first step of Adam is as long as the learning rate
    torch.testing.assert_close((factors.lora_B - before).abs(), torch.full_like(before, 0.05), rtol=1e-2, atol=0)
    assert made.state[factors.lora_B]["step"] == 1
