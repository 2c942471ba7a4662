"""One of two processes: they decide alike, and as one process does that looks at the batches of both."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from peft import get_peft_model
from tests.allocation.scenes import adapted
from tests.tuner.tiny_models import config, llama
from tests.tuner.trainer_arguments import arguments
from tests.two_processes import end_as_equal
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from loraplex import ALoRA, HeteroLoRA, start_allocation
from loraplex.training_hooks.allocation_in_trainer import decisions

EVERY = {"batches": 2, "interval": 2, "share": 0.5}
CASES = {
    "static": HeteroLoRA(batches=2, share=0.5),
    "dynamic": HeteroLoRA(**EVERY),
    "fisher": HeteroLoRA(**EVERY, proxy="fisher"),
    "snip": HeteroLoRA(**EVERY, proxy="snip", scoring_init="random"),
    "alora": ALoRA(rounds=2, warmup_epochs=2, interval_epochs=2, in_steps=True, ranks_per_round=3),
}
STEPS = 5


def rows(count=3):
    """Batches of four rows; the two halves of each differ and have as many targets."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(4, 60, (4, 7), generator=generator)
        made.append({"input_ids": ids, "labels": ids.clone()})
    return made


def driven(allocation, batches, parallel=False, seed=0):
    """Return the decisions of a short training, and the gates that it ends with."""
    model = adapted(identity=True, allocation=allocation, r=4, seed=seed)
    called = model
    if parallel:
        called = DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
    drive = start_allocation(model, batches, total_steps=STEPS)
    for index in range(STEPS):
        made.zero_grad()
        called(**batches[index % len(batches)]).loss.backward()
        made.step()
        drive.step()
    gates = {layer.site: layer.adapter("default").factors.gate.tolist() for layer in model.base_model.site_layers()}
    return [(decision.step, dict(decision.plan.ranks)) for decision in drive.decisions], gates


def under_a_trainer(folder):
    """The same under an unmodified Trainer, which gives each process rows of its own."""
    model = get_peft_model(llama(), config(allocation=HeteroLoRA(batches=2, interval=2)))
    data = [{"input_ids": list(range(5 + i, 15 + i)), "labels": list(range(5 + i, 15 + i))} for i in range(16)]
    given = arguments(Path(folder), max_steps=5, per_device_train_batch_size=2, ddp_backend="gloo")
    trainer = Trainer(model, TrainingArguments(**given), train_dataset=data)
    trainer.train()
    gates = {layer.site: layer.adapter("default").factors.gate.tolist() for layer in model.base_model.site_layers()}
    return [(entry["step"], entry["ranks"]) for entry in decisions(trainer.state.log_history)], gates


def both(value):
    found = [None, None]
    dist.all_gather_object(found, json.dumps(value, sort_keys=True))
    return found


def main(folder):
    whole = rows()
    # before there is a second process to speak to
    alone = {name: driven(allocation, whole) for name, allocation in CASES.items()}
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    half = [{key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()} for batch in whole]
    for name, allocation in CASES.items():
        first = driven(allocation, half, parallel=True)
        mine, theirs = both(first)
        assert mine == theirs, name
        assert first == alone[name], (name, first[0], alone[name][0])
        assert len(first[0]) == (1 if name == "static" else 2 if name == "alora" else 3), name
        if name in ("static", "dynamic", "alora"):
            assert first == driven(allocation, half, parallel=True), name
    # seeds that differ, and chance that decides: the first process does
    found, _ = driven(HeteroLoRA(proxy="constant", batches=1, interval=2), half, parallel=True, seed=rank)
    mine, theirs = both(found)
    assert mine == theirs
    mine, theirs = both(under_a_trainer(folder))
    assert mine == theirs
    assert [step for step, _ in json.loads(mine)[0]] == [0, 2, 4]
    end_as_equal()


if __name__ == "__main__":
    main(sys.argv[1])
