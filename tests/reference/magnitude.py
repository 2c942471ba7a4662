"""DoRA by the book: W' = m · V / ‖V‖_row, V = W0 + BA formed, the norm a constant (arXiv 2402.09353 section 4.3)."""

import torch
from torch import Tensor

from loraplex import Magnitude

VARIANTS = [Magnitude()]


def weight(options: Magnitude, w0: Tensor, a: Tensor, b: Tensor, gate: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """Return W' (out, in); a site whose ranks are all closed is W0."""
    if not gate.any():
        return w0
    v = w0 + b @ a
    norm = torch.linalg.vector_norm(v, dim=1).detach()
    return tensors["lora_magnitude_vector"][:, None] * v / norm[:, None]
