"""Allocations that cannot act, and options that make no sense: one sentence each."""

from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.allocation.moving import DYNAMIC, ROWS, adapted, arguments, train
from tests.allocation.scenes import batches
from transformers import Trainer

from loraplex import AdapterConfig, ALoRA, HeteroLoRA, UserError, start_allocation
from loraplex.training_hooks.registry import LoraplexCallback


@pytest.mark.parametrize(
    ("before", "now"), [(DYNAMIC, "uniform"), (DYNAMIC, HeteroLoRA(batches=2)), ("uniform", DYNAMIC)]
)
def test_a_checkpoint_of_another_allocation_is_refused(before: Any, now: Any, tmp_path: Path) -> None:
    train(adapted(before), tmp_path, save_strategy="steps", save_steps=3)
    with pytest.raises(UserError, match=r"the checkpoint (of step 3 )?was trained with the allocation .*: resume with"):
        train(adapted(now), tmp_path, resume=str(tmp_path / "checkpoint-3"))


def test_batches_without_a_loss_are_refused() -> None:
    model = adapted(HeteroLoRA(batches=1))
    with pytest.raises(UserError, match=r"no loss for a batch with the keys input_ids: .* need labels"):
        start_allocation(model, [{"input_ids": batches()[0]["input_ids"]}], total_steps=3)
    with pytest.raises(UserError, match=r"a batch is a tuple: give mappings"):
        start_allocation(model, [(batches()[0]["input_ids"],)], total_steps=3)
    for steps in (0, 2.5, "4", -1):
        with pytest.raises(UserError, match=r"total_steps is .*: give a whole number"):
            start_allocation(model, batches(), total_steps=steps)


def test_what_would_train_copies_is_refused(tmp_path: Path) -> None:
    model = adapted(DYNAMIC, objective={"name": "echo", "targets": [0], "sources": [2]})
    trainer = Trainer(model, arguments(tmp_path), train_dataset=ROWS)
    given = {"model": model, "train_dataloader": trainer.get_train_dataloader()}
    for changed, words in (({"_n_gpu": 2}, "DataParallel"), ({"deepspeed": "ds.json"}, "DeepSpeed")):
        args = copy(trainer.args)
        args.__dict__.update(changed)
        with pytest.raises(UserError, match=f"the allocation of 'default' cannot act under {words}"):
            LoraplexCallback().on_train_begin(args, trainer.state, trainer.control, **given)
        if "_n_gpu" in changed:
            with pytest.raises(UserError, match="the objective 'echo' cannot act under DataParallel"):
                LoraplexCallback().parts[-1].on_train_begin(args, trainer.state, trainer.control, **given)


def test_an_allocation_that_would_never_act_is_refused() -> None:
    for allocation, option in ((ALoRA(), "warmup_epochs"), (HeteroLoRA(warm_up=9), "warm_up")):
        with pytest.raises(UserError, match=f"never acts: no revision is due before the last of 9 steps.* {option}$"):
            start_allocation(adapted(allocation), batches(), total_steps=9)


def test_scores_that_are_no_numbers_are_refused() -> None:
    model = adapted(HeteroLoRA(batches=2))
    next(model.base_model.site_layers()).base_layer.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"the score of .* at step 0 is nan: the loss of the first batches"):
        start_allocation(model, batches(), total_steps=9)


def test_a_step_that_nobody_drives_is_stopped() -> None:
    model = adapted(DYNAMIC)
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**batches()[0]).loss.backward()
    with pytest.raises(
        UserError, match=r"'default' has an allocation that nobody drives: .*loraplex\.start_allocation"
    ):
        made.step()


def test_driving_what_does_not_move_is_refused() -> None:
    with pytest.raises(UserError, match="the allocation of 'default' is 'uniform', which moves no ranks"):
        start_allocation(adapted("uniform"), batches(), 3)
    with pytest.raises(UserError, match="carries no loraplex adapter 'other'"):
        start_allocation(adapted(DYNAMIC), batches(), 3, adapter_name="other")


@pytest.mark.parametrize("name", ["lora-xs", "tied-tl6", "prolora"])
def test_factors_that_do_not_shrink_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="allocation 'hetero' needs parameters that go with closed ranks"):
        AdapterConfig(adapter=name, allocation="hetero")


@pytest.mark.parametrize(
    ("allocation", "words"),
    [
        ({"name": "hetero", "proxy": "gradnorm"}, "proxy is 'gradnorm': choose .* Did you mean 'grad_norm'"),
        ({"name": "hetero", "share": 0}, "share is 0: give a number above 0 and up to 1"),
        ({"name": "hetero", "ranks": "proportional"}, "proportional needs a budget of ranks or parameters"),
        ({"name": "hetero", "shar": 0.5}, "unknown option 'shar' of allocation 'hetero'.*'share'"),
        ({"name": "alora", "group_by": "layer"}, "group_by is 'layer': choose 'site' or 'kind'"),
        ({"name": "alora", "unit": "modules"}, "unit is 'modules': choose 'ranks' or 'parameters'"),
        ("heterro", "unknown allocation 'heterro'.*'hetero'"),
        ({"name": ["hetero"]}, "unknown allocation "),
        (None, "None stands for no method: give a name"),
        (HeteroLoRA, "stands for no method: give a name"),
        ({"name": "hetero", "interval": "1"}, "interval is '1': give steps"),
        ({"name": "hetero", "tolerance": "x"}, "tolerance is 'x': give a share"),
        ({"name": "hetero", "tolerance": float("nan")}, "tolerance is nan: give a share"),
        ({"name": "hetero", "shortcuts": 3}, "shortcuts names 3: choose true"),
        ({"name": "alora", "in_steps": "yes"}, "in_steps is 'yes': give true or false"),
        ({"name": "uniform", "plan": "/"}, "/ is no plan: give a file"),
    ],
)
def test_wrong_options_are_one_sentence(allocation: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        AdapterConfig(allocation=allocation)


def test_a_budget_that_pays_for_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the budget of 0 modules does not pay for a single site"):
        train(adapted(HeteroLoRA(share=0.01, batches=1)), tmp_path)
