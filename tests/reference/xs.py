"""LoRA-XS by the book, fp64: ΔW = s·U·R·diag(gate)·A with frozen A and U (arXiv 2405.17604)."""

from torch import Tensor

from loraplex.adapters.xs import LoRAXS

VARIANTS = [LoRAXS(), LoRAXS(exact_svd=True, store_bases=True)]


def pair(options: LoRAXS, alpha: float, rank: int, w0: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) with s = alpha/r on B."""
    return tensors["frozen_A"], alpha / rank * tensors["frozen_B"] @ tensors["lora_R"] @ tensors["gate"].diag()
