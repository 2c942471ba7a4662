"""A tiny model with an adapter, its scene for an allocator, and the same as plain pairs for the reference."""

import torch
from peft import get_peft_model
from tests.tuner.tiny_models import llama

from loraplex import AdapterConfig
from loraplex.allocation.budget import Budget
from loraplex.allocation.contracts import ScoringContext
from loraplex.tuner.candidates import candidates_of

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def batches(count=3, rows=2, length=7):
    """Rows of different lengths, padded on the right, some positions without a label."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        ids = torch.randint(4, 60, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, length - 1 - index :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        made.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return made


def context(model, found=None, budget=None, seed=0):
    candidates = candidates_of(model.base_model, "default")
    return ScoringContext(
        candidates=candidates,
        budget=budget or Budget(2, "modules"),
        batches=batches() if found is None else found,
        model=model.base_model.model,
        step=0,
        seed=seed,
    )


def adapted(identity=False, **fields):
    """In float64, away from the initial point unless `identity`."""
    config = AdapterConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": TARGETS, "seed": 0, "init_lora_weights": identity, **fields}
    )
    model = get_peft_model(llama().double(), config, autocast_adapter_dtype=False).double()
    return model.train()


def pairs(model):
    """By site (A, B, s), as leaves of their own."""
    found = {}
    for layer in model.base_model.site_layers():
        factors = layer.adapter("default").factors
        a, b = (tensor.detach().clone().requires_grad_() for tensor in factors.raw_pair())
        found[layer.site] = (a, b, factors.scale)
    return found
