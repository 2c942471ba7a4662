"""What the tests of the objective share: a small model with an echo, rows of different lengths, and their batches."""

import torch
from peft import get_peft_model
from tests.tuner.tiny_models import VOCABULARY, config, llama, move

from loraplex.tuner.layer import SiteLayer

BLOCKS = 6
BOUNDARIES = (4, 5, 6)
LENGTHS = ((5, 3), (2, 2), (4, 6))
"""Tokens of prompt and answer of every row."""


def options(**changed):
    """An objective whose every part acts: no ramp, no draws, unless they are asked for."""
    return {"name": "echo", "probability": 1.0, "target_dropout": 0.0, "ramp": 0, **changed}


def echoing(objective=None, *, base=None, dtype=torch.float64, moved=True, **fields):
    base = llama(num_hidden_layers=BLOCKS) if base is None else base
    if dtype == torch.float64:
        in_float64(base)
    given = options() if objective is None else objective
    model = get_peft_model(
        base.to(dtype), config(objective=given, **fields), autocast_adapter_dtype=dtype == torch.float32
    )
    if moved:
        move(model, scale=0.3)
    typed = model.peft_config["default"].adapter
    for module in model.modules():
        if isinstance(module, SiteLayer):
            module.oracle_options = (typed.factors, typed.combine)
    return model.train()


class Float64Norm(torch.nn.Module):
    """A norm that computes in the type of its input: transformers' round to float32, which hides the tenth digit."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = getattr(norm, "weight", None), norm.variance_epsilon

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return x if self.weight is None else self.weight * x


def in_float64(base):
    """Put norms in float64 in the place of those that round."""
    for name, module in list(base.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            base.set_submodule(name, Float64Norm(module))


def objective_of(model):
    return model.base_model.objectives()["default"]


def rows(lengths=LENGTHS, seed=4):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for prompt, answer in lengths:
        ids = torch.randint(2, VOCABULARY, (prompt + answer,), generator=generator).tolist()
        found.append((ids, [-100] * prompt + ids[prompt:]))
    return found


def padded(given, side="right"):
    longest = max(len(ids) for ids, _ in given)
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, labels in given:
        fill = longest - len(ids)
        for name, values, padding in (
            ("input_ids", ids, 0), ("labels", labels, -100), ("attention_mask", [1] * len(ids), 0)
        ):  # fmt: skip
            batch[name].append(values + [padding] * fill if side == "right" else [padding] * fill + values)
    return {name: torch.tensor(values) for name, values in batch.items()}


def flattened(given, borders=False):
    """One row, as TRL's padding-free collator makes it; with `borders`, as transformers' with flash attention does."""
    ids = [token for row, _ in given for token in row]
    labels = [label for _, row in given for label in [-100, *row[1:]]]
    positions = [place for row, _ in given for place in range(len(row))]
    batch = {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }
    if borders:
        lengths = [len(row) for row, _ in given]
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return batch


def targets_of(model):
    return list(objective_of(model).targets)


def gradients(model, loss):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def items(given):
    return sum(label != -100 for _, labels in given for label in labels[1:])
