"""What an allocation trains and what it keeps are two numbers, before, during and after."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.allocation.scenes import batches
from tests.tuner.tiny_models import config, llama

from loraplex import ALoRA, HeteroLoRA, print_trainable_parameters, start_allocation
from loraplex.tuner.counting import count_parameters


def adapted(allocation, **fields):
    return get_peft_model(llama(), config(allocation=allocation, **fields))


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_candidates_budget_and_what_is_open_are_told_apart(adapter, capsys) -> None:
    model = adapted(HeteroLoRA(batches=1, share=0.5, unit="parameters", ranks="proportional"), adapter=adapter)
    trainable, total = model.get_nb_trainable_parameters()
    before = count_parameters(model)
    assert (before.trainable, before.total, before.open, before.candidates) == (trainable, total, trainable, 14)
    assert before.kept == before.most == trainable // 2
    print_trainable_parameters(model)
    theirs, ours = capsys.readouterr().out.splitlines()
    assert theirs.startswith(f"trainable params: {trainable:,} || all params: {total:,}")
    assert ours == (f"candidates: {trainable:,} parameters in 14 sites || budget: {trainable // 2:,} parameters")
    start_allocation(model, batches(), total_steps=9)
    now = count_parameters(model)
    assert now.trainable == trainable
    assert 0.95 * now.kept <= now.open <= now.kept
    print_trainable_parameters(model)
    assert capsys.readouterr().out.splitlines()[1] == f"{ours} || open now: {now.open:,} parameters"
    # what is open is what the gates say, the magnitude of a site that is off not counted
    sizes = {"lora": 0, "dora": 1}[adapter]
    expected = sum(
        (f := layer.adapter("default").factors).open_ranks * (layer.in_features + layer.out_features)
        + sizes * layer.out_features * bool(f.open_ranks)
        for layer in model.base_model.site_layers()
    )
    assert now.open == expected


def test_budgets_of_modules_and_ranks_are_worth_what_equal_sites_cost() -> None:
    by_module = count_parameters(adapted(HeteroLoRA(share=0.5)))
    assert by_module.kept == by_module.trainable // 2
    assert by_module.most > by_module.kept
    moving = count_parameters(adapted(ALoRA()))
    plain = count_parameters(adapted("uniform"))
    # room for a rank more in each of eight rounds is trained, what is open is that of the configured rank, 4
    assert (moving.trainable, moving.kept) == (3 * plain.trainable, plain.trainable)
    exact = count_parameters(adapted(ALoRA(unit="parameters")))
    assert exact.kept == exact.most == plain.trainable


def test_without_an_allocation_peft_has_said_all(capsys) -> None:
    for model in (adapted("uniform"), get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))):
        print_trainable_parameters(model)
        assert len(capsys.readouterr().out.splitlines()) == 1
        counted = count_parameters(model)
        assert counted.kept == counted.open == counted.trainable == model.get_nb_trainable_parameters()[0]


def test_counting_needs_no_storage() -> None:
    with torch.device("meta"):
        model = adapted(HeteroLoRA(share=0.25))
    assert count_parameters(model).open == count_parameters(model).trainable
