"""LoRA+: B learns at a multiple of A's rate under trainers that know nothing of it, or training stops."""

from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.tuner.tiny_models import llama, qwen2
from tests.tuner.trainer_arguments import arguments as defaults
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from loraplex import AdapterConfig, UserError

RATIO = 16
ROWS = [{"input_ids": list(range(5 + i, 15 + i)), "labels": list(range(5 + i, 15 + i))} for i in range(8)]


def model(**options: Any) -> PeftModel:
    config = AdapterConfig(
        adapter={"name": "lora", "loraplus_lr_ratio": RATIO, **options},
        r=3,
        target_modules=["q_proj", "down_proj"],
        seed=0,
    )
    return get_peft_model(llama(), config)


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    own = {"weight_decay": 0.1, "warmup_steps": 2, "per_device_train_batch_size": 2, "seed": 3, **changed}
    return TrainingArguments(**defaults(folder, **own))


def trained(tensors: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in tensors.named_parameters() if p.requires_grad}


class TwoRates(Trainer):
    """The definition: two groups, which the scheduler knows."""

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        rate = self.args.learning_rate
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for name, p in named if "lora_B" not in name and p.ndim > 1], "lr": rate},
                {"params": [p for name, p in named if "lora_B" in name or p.ndim == 1], "lr": RATIO * rate},
            ],
            weight_decay=0.1,
        )
        return self.optimizer


@pytest.mark.parametrize("adapter", [{}, {"combine": "magnitude", "factors": "lora"}, {"init": "pissa"}], ids=str)
def test_a_trainer_that_knows_nothing_of_it_trains_as_with_two_groups(adapter: dict[str, Any], tmp_path: Path) -> None:
    options = {"name": "lora", **adapter}
    if "factors" in options:
        del options["name"]

    def fresh(ratio: float) -> PeftModel:
        config = AdapterConfig(
            adapter={**options, "loraplus_lr_ratio": ratio}, r=3, target_modules=["q_proj", "down_proj"], seed=0
        )
        return get_peft_model(llama(), config)

    mine, theirs = fresh(RATIO), fresh(1)
    trainer = Trainer(mine, arguments(tmp_path), train_dataset=ROWS)
    trainer.train()
    TwoRates(theirs, arguments(tmp_path), train_dataset=ROWS).train()
    expected = trained(theirs)
    for name, tensor in trained(mine).items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    # the groups are as the trainer made them
    assert len({group["lr"] for group in trainer.optimizer.param_groups}) == 1
    changed = fresh(1)
    Trainer(changed, arguments(tmp_path), train_dataset=ROWS).train()
    assert any(not torch.allclose(trained(changed)[name], expected[name]) for name in expected)


def test_resumed_training_equals_uninterrupted(tmp_path: Path) -> None:
    kept = {"save_strategy": "steps", "save_steps": 3}
    whole = model()
    Trainer(whole, arguments(tmp_path, **kept), train_dataset=ROWS).train()
    resumed = model()
    trainer = Trainer(resumed, arguments(tmp_path, **kept), train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in trained(whole).items():
        torch.testing.assert_close(trained(resumed)[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copied"])
def test_a_plain_loop_needs_nothing(copied: bool) -> None:
    adapted = deepcopy(model()) if copied else model()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    ids = torch.arange(5, 15)[None]
    # B = 0 at the start, so the first step moves B alone; the second moves both
    for _ in range(2):
        optimizer.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        before = trained(adapted)
        gradients = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}
        optimizer.step()
    for name, after in trained(adapted).items():
        rate = 0.5 * (RATIO if "lora_B" in name else 1)
        torch.testing.assert_close(after, before[name] - rate * gradients[name])
        assert gradients[name].abs().max() > 0


def test_what_an_optimizer_counts_in_its_groups_survives() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
            super().step(closure)

    adapted = model()
    optimizer = Counting([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(5, 15)[None]
    for _ in range(3):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert [group["count"] for group in optimizer.param_groups] == [3]


def test_a_step_that_fails_leaves_nothing_behind() -> None:
    class Failing(torch.optim.SGD):
        fails = True

        def step(self, closure: Any = None) -> None:
            if self.fails:
                raise RuntimeError("no")
            super().step(closure)

    adapted = model()
    optimizer = Failing([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(5, 15)[None]
    adapted(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    optimizer.fails = False
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_an_optimizer_that_does_not_hold_the_parameters_stops_training(tmp_path: Path) -> None:
    class Flat(Trainer):
        """As engines do that train one flat copy of all parameters."""

        def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
            flat = torch.cat([p.detach().flatten() for p in self.model.parameters() if p.requires_grad])
            self.optimizer = torch.optim.AdamW([nn.Parameter(flat)], lr=1e-2)
            return self.optimizer

    trainer = Flat(model(), arguments(tmp_path), train_dataset=ROWS)
    with pytest.raises(UserError, match="loraplus_lr_ratio would have no effect: AdamW does not hold"):
        trainer.train()


@pytest.mark.parametrize("ratio", [0, -1, float("inf"), float("nan"), "16", True])
def test_what_is_no_ratio_is_refused(ratio: Any) -> None:
    with pytest.raises(UserError, match=r"loraplus_lr_ratio is .*: give a number above 0, such as 16"):
        model(loraplus_lr_ratio=ratio)


@pytest.mark.parametrize("name", ["lora-xs", "tied-tl6"])
def test_it_is_refused_where_no_b_is_trained_for_itself(name: str) -> None:
    with pytest.raises(UserError, match="unknown adapter option 'loraplus_lr_ratio'"):
        get_peft_model(llama(), AdapterConfig(adapter={"name": name, "loraplus_lr_ratio": 16}))


def test_prolora_s_b_is_its_chunk_and_its_whole_ranks() -> None:
    config = AdapterConfig(adapter={"name": "prolora", "loraplus_lr_ratio": 4}, r=3, target_modules=["q_proj"], seed=0)
    adapted = get_peft_model(llama(), config)
    rated = {id(p): rate.ratio for p, rate in adapted.base_model.rates()}
    found = {name for name, p in adapted.named_parameters() if id(p) in rated}
    assert found == {name for name, p in adapted.named_parameters() if "lora_B" in name}
    assert set(rated.values()) == {4}
    assert any(name.endswith("lora_B_unshared") for name in found)


def with_groups(tensors: PeftModel, make: Any, *, vectors: bool = True) -> torch.optim.Optimizer:
    """The optimizer that LoRA+'s own code builds: B and whatever has one dimension at the larger rate."""
    named = [(name, p) for name, p in tensors.named_parameters() if p.requires_grad]
    fast = [p for name, p in named if "lora_B" in name or (vectors and p.ndim == 1)]
    slow = [p for _, p in named if not any(p is other for other in fast)]
    return make([{"params": slow, "lr": 0.01}, {"params": fast, "lr": 0.01 * RATIO}])


def loop(tensors: PeftModel, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for index in range(first, last):
        batch = torch.tensor([ROWS[index % len(ROWS)]["input_ids"]])
        optimizer.zero_grad()
        tensors(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


NEEDS = pytest.mark.skipif(find_spec("schedulefree") is None, reason="schedulefree is not installed")


def schedule_free(groups: Any, **settings: Any) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(groups, warmup_steps=3, **settings)
    optimizer.train()
    return optimizer


@pytest.mark.parametrize(
    "make", [pytest.param(torch.optim.AdamW, id="adamw"), pytest.param(schedule_free, id="schedule-free", marks=NEEDS)]
)
@pytest.mark.parametrize("resumed", [False, True])
def test_what_an_optimizer_keeps_in_its_groups_is_each_parts_own(make: Any, resumed: bool) -> None:
    """Schedule-free optimizers sum weights that follow from the rate: two groups are the definition, bit for bit."""
    mine, theirs = model(), model(loraplus_lr_ratio=1)
    one = make([p for p in mine.parameters() if p.requires_grad], lr=0.01)
    two = with_groups(theirs, make)
    loop(mine, one, 0, 4)
    if resumed:
        other = make([p for p in mine.parameters() if p.requires_grad], lr=0.01)
        other.load_state_dict(deepcopy(one.state_dict()))
        one = other
        if make is schedule_free:
            one.train()
    loop(mine, one, 4, 8)
    loop(theirs, two, 0, 8)
    expected = trained(theirs)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained(mine).items())


@pytest.mark.parametrize("vectors", [True, False])
def test_vectors_learn_at_the_larger_rate_as_published_or_not(vectors: bool) -> None:
    options = {"factors": "lora", "combine": "magnitude", "loraplus_vectors": vectors}

    def fresh(ratio: float) -> PeftModel:
        config = AdapterConfig(
            adapter={**options, "loraplus_lr_ratio": ratio}, r=3, target_modules=["q_proj"], seed=0, bias="all"
        )
        return get_peft_model(qwen2(), config)

    mine, theirs = fresh(RATIO), fresh(1)
    assert sum(p.ndim == 1 and p.requires_grad for p in mine.parameters()) == 2 + 6
    loop(mine, torch.optim.AdamW([p for p in mine.parameters() if p.requires_grad], 0.01), 0, 4)
    loop(theirs, with_groups(theirs, torch.optim.AdamW, vectors=vectors), 0, 4)
    expected = trained(theirs)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained(mine).items())
