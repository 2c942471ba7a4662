"""Tied-LoRA by the book, fp64: ΔW = s·diag(v)·B·diag(u)·diag(gate)·A (arXiv 2311.09578)."""

import torch
from torch import Tensor

from loraplex.adapters.tied import TiedLoRA

VARIANTS = [
    TiedLoRA(),
    TiedLoRA(train_u=False, train_v=False),
    TiedLoRA(train_A=False, train_B=False),
    TiedLoRA(train_B=False, train_v=False, fused=()),
    TiedLoRA(tie_A=False, tie_B=False),
]


def pair(options: TiedLoRA, alpha: float, rank: int, w0: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) with s = alpha/r on B."""
    a, b = tensors["shared_A.lora_A"], tensors["shared_B.lora_B"]
    u = tensors.get("shared_u.lora_u", torch.ones(rank, dtype=a.dtype))
    v = tensors.get("lora_v", torch.ones(len(w0), dtype=a.dtype))
    return u.diag() @ a, alpha / rank * v.diag() @ b @ tensors["gate"].diag()
