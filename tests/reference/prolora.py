"""PRoLoRA by the book, fp64, element by element, as its official code has it (arXiv 2402.16902)."""

import math

import torch
from torch import Tensor

from loraplex.adapters.prolora import PRoLoRA

# copies that divide no width, more copies than ranks, strides of 1 and more
VARIANTS = [PRoLoRA(u=0, m=2, n=3), PRoLoRA(u=1, m=4, n=2), PRoLoRA(u=1, m=1, n=1, use_rslora=True)]


def pair(options: PRoLoRA, alpha: float, rank: int, w0: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) with s = alpha/r or alpha/sqrt(r) on B."""
    scale = alpha / math.sqrt(rank) if options.use_rslora else alpha / rank
    height, width = w0.shape
    shared = rank - options.u
    rows, columns = [], []
    for k in range(shared):
        a0, b0 = tensors["lora_A"], tensors["lora_B"]
        c_a, c_b = math.ceil(width / options.m), math.ceil(height / options.n)
        s_a, s_b = max(shared // options.m, 1), max(shared // options.n, 1)
        rows.append(torch.stack([a0[(k + i // c_a * s_a) % shared, i % c_a] for i in range(width)]))
        columns.append(torch.stack([b0[i % c_b, (k + i // c_b * s_b) % shared] for i in range(height)]))
    for k in range(options.u):
        rows.append(tensors["lora_A_unshared"][k])
        columns.append(tensors["lora_B_unshared"][:, k])
    return torch.stack(rows), scale * torch.stack(columns, dim=1) @ tensors["gate"].diag()
