"""One of two processes: an adapter under FSDP2 gives the loss and gradients of the whole model. Arguments: presets."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from tests.tuner.tiny_models import adapted, tokens
from torch.distributed.fsdp import fully_shard


def loss(model):
    value = model(input_ids=tokens(), labels=tokens()).loss
    value.backward()
    return value.detach()


def main(names):
    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for name in names:
        whole, sharded = adapted(adapter=name), adapted(adapter=name)
        for block in sharded.base_model.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        torch.testing.assert_close(loss(sharded), loss(whole), rtol=1e-6, atol=1e-7)
        expected = {key: p.grad for key, p in whole.named_parameters() if p.grad is not None}
        found = {key: p.grad.full_tensor() for key, p in sharded.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys(), name
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-7, msg=f"{name} {key}")
        if dist.get_rank() == 0:
            sys.stdout.write(f"{name} equal\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
