"""LoRA by the book, fp64: ΔW = s·B·diag(gate)·A (methods: arXiv 2106.09685 section 4.1; rsLoRA arXiv 2312.03732;
PiSSA arXiv 2404.02948)."""

import math

import torch
from torch import Tensor

from loraplex import LoRA

VARIANTS = [LoRA(), LoRA(use_rslora=True), LoRA(init="pissa")]


def pair(options: LoRA, alpha: float, rank: int, w0: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) with s = alpha/r or alpha/sqrt(r) on B; under PiSSA (2r, in) and (out, 2r)."""
    scale = alpha / math.sqrt(rank) if options.use_rslora else alpha / rank
    gates = tensors["gate"].diag()
    a, b = tensors["lora_A"], tensors["lora_B"] @ gates
    if options.init == "pissa":
        # the base is not mutated, so the initial pair is subtracted (arXiv 2404.02948, its conversion to LoRA)
        a, b = torch.cat([a, tensors["initial_A"]]), torch.cat([b, -tensors["initial_B"] @ gates], dim=1)
    return a, scale * b
