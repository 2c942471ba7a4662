"""One of two processes: under DDP the objective draws alike on both, and gives the gradients of the whole batch."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest
import torch
import torch.distributed as dist
from tests.objectives.echoing import echoing, items, objective_of, options, padded, rows
from tests.two_processes import end_as_equal
from torch.nn.parallel import DistributedDataParallel

from loraplex import UserError

LENGTHS = ((5, 3), (2, 2), (4, 6), (3, 1))


def step(model, given, total, scale=1.0):
    for parameter in model.parameters():
        parameter.grad = None
    loss = scale * model(**padded(given), num_items_in_batch=total).loss
    loss.backward()
    named = ((name.removeprefix("module."), p) for name, p in model.named_parameters())
    return loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def main():
    dist.init_process_group("gloo")
    rank, given = dist.get_rank(), rows(LENGTHS)
    whole, half = (echoing(options(probability=0.5), seed=3) for _ in range(2))
    parallel = DistributedDataParallel(half)
    # as if each process had drawn its own
    objective_of(half).seed += rank
    routed = []
    for number in range(6):
        for model in (whole, half):
            objective_of(model).step = number
        _, expected = step(whole, given, items(given))
        # DDP takes the mean over the ranks, the loss is divided by the tokens of both
        loss, found = step(parallel, given[2 * rank : 2 * rank + 2], items(given), scale=2.0)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max() + 1e-12, name
        routed.append(objective_of(half).report()["routed"])
        both = [torch.zeros(1), torch.zeros(1)]
        dist.all_gather(both, torch.tensor([routed[-1]]))
        assert both[0] == both[1]
        assert loss.isfinite()
    assert set(routed) == {0.0, 1.0}
    half.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UserError, match=r"reentrant checkpoints in several processes: set .*'use_reentrant': False"):
        step(parallel, given[2 * rank : 2 * rank + 2], items(given))
    end_as_equal()


if __name__ == "__main__":
    main()
