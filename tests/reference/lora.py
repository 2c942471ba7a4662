"""LoRA by the book, fp64: ΔW = s·B·diag(gate)·A (methods: arXiv 2106.09685 section 4.1; rsLoRA arXiv 2312.03732)."""

import math

from torch import Tensor

from loraplex import LoRA

VARIANTS = [LoRA(), LoRA(use_rslora=True)]


def pair(options: LoRA, alpha: float, rank: int, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) with s = alpha/r or alpha/sqrt(r) on B."""
    scale = alpha / math.sqrt(rank) if options.use_rslora else alpha / rank
    gates = tensors["gate"].diag()
    return tensors["lora_A"], scale * tensors["lora_B"] @ gates
