"""The limit: what the frozen model costs by itself.

Forward, and backward down to the embeddings, without padding, attention inside each sequence alone, the output layer
at labeled positions only, no adapters. Any adapter adds to this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from loraplex.data.tokenization import TokenRow

_NAME = "limit"


def limit_step(model: PreTrainedModel) -> Callable[[list[TokenRow]], float]:
    """Return the function that runs a batch through `model` and back and returns its mean loss."""
    lengths: list[int] = []

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Causal attention of each sequence to itself: (1, heads, tokens, d) to (1, tokens, heads, d)."""
        sequences = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
        done = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2)
            for q, k, v in sequences
        ]
        return torch.cat(done, dim=1), None

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    model.requires_grad_(False).set_attn_implementation(_NAME)

    def step(batch: list[TokenRow]) -> float:
        lengths[:] = [len(row["input_ids"]) for row in batch]
        ids = torch.tensor([token for row in batch for token in row["input_ids"]])
        learnt = torch.tensor([mark for row in batch for mark in row["completion_mask"]]).bool()
        positions = torch.cat([torch.arange(length) for length in lengths])
        embeddings = model.get_input_embeddings()(ids[None]).requires_grad_()
        output = model.base_model(inputs_embeds=embeddings, position_ids=positions[None], use_cache=False)
        # The token at each learnt place is foretold by the place before it.
        logits = model.lm_head(output.last_hidden_state[0, :-1][learnt[1:]])
        loss = F.cross_entropy(logits.float(), ids[1:][learnt[1:]])
        loss.backward()
        return float(loss.detach())

    return step
