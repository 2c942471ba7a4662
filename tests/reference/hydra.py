"""HydraLoRA by the book, fp64: a loop over tokens and heads, A applied once per head (arXiv 2404.19245 section 3)."""

import torch
from torch import Tensor

from loraplex.adapters.hydra import Heads, Route

VARIANTS = [Heads(heads=3), Heads(), Route(), Route(top_k=2), Route(dropout_per_head=True)]


def output(
    factors: Heads, combine: Route, alpha: float, w0: Tensor, bias: Tensor | None, x: Tensor, tensors: dict[str, Tensor]
) -> Tensor:
    """Return y (..., out) of x (..., in); closed ranks are taken out of every head."""
    a, stacked, router, gate = (tensors[name] for name in ("lora_A", "lora_B", "lora_route", "gate"))
    rank = len(a)
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        logits = torch.stack([router[i] @ token for i in range(factors.heads)])
        if combine.top_k is not None:
            kept = sorted(range(factors.heads), key=lambda i: -logits[i].item())[: combine.top_k]
            logits = torch.stack([logits[i] if i in kept else logits[i] - torch.inf for i in range(factors.heads)])
        powers = (logits - logits.max()).exp()
        gates = powers / powers.sum()
        y = w0 @ token + (0 if bias is None else bias)
        for i in range(factors.heads):
            head = stacked[:, i * rank : (i + 1) * rank] @ gate.diag()
            y = y + alpha / rank * gates[i] * (head @ (a @ token))
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1)
