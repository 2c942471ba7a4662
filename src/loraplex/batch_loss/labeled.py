"""A training batch as the tuner computes it itself: the backbone run on it, and its rows where a label is predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.batch_loss.packing import Packed, pack
from loraplex.compat.torch import number_of_hooks
from loraplex.kernels.label_head import label_log_probs
from loraplex.models.modes import evaluation_mode

IGNORED = -100
"""The label of a token that is not learned."""
_PROBE_TOKENS = 4


@dataclass(frozen=True)
class Head:
    """A frozen language-model head: z = cap(scale · (h Wᵀ + b)) with cap(z) = softcap · tanh(z / softcap)."""

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    @torch.no_grad()
    def gives(self, logits: Tensor, hidden: Tensor) -> bool:
        """Return whether the logits (batch, t, V) are those of the hidden states (batch, t, d), to rounding."""
        mine = self.linear(hidden.to(self.linear.weight)).float() * self.scale
        if self.softcap is not None:
            mine = torch.tanh(mine / self.softcap) * self.softcap
        return mine.shape == logits.shape and torch.allclose(mine, logits.float(), 1e-2, 1e-3)

    def log_probs(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log p(label), the entropy and whether the label is on top, each (n,), for rows (n, d), labels (n,)."""
        weight = self.linear.weight
        return label_log_probs(
            rows.to(weight.device, weight.dtype), weight, self.linear.bias, labels, self.scale, self.softcap
        )


@dataclass(frozen=True)
class Labeled:
    """A batch with labels, its padding taken out where the model allows."""

    args: tuple[Any, ...]
    inputs: dict[str, Any]
    """Arguments of the backbone."""
    packed: Packed | None
    mask: Tensor
    """(batch, T − 1): whether a position predicts a label."""
    targets: Tensor
    """(n,) the labels that are predicted."""

    def hidden(self, backbone: nn.Module, **extra: Any) -> Tensor:
        """Return the last hidden state where a label is predicted, (n, d); `extra` goes to the backbone too."""
        hidden: Tensor = backbone(*self.args, **self.inputs | {"use_cache": False} | extra).last_hidden_state
        mask = self.mask.to(hidden.device)
        return hidden[:, :-1][mask] if self.packed is None else hidden[0, self.packed.place[:, :-1][mask]]


def first_look(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the logits of a few tokens, and the last hidden states of the backbone under them.

    The model runs as it evaluates: no dropout draws, and nothing of an objective's acts. The states are None where it
    does not run its backbone as a whole, as OPT does not.
    """
    seen: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng():
            logits = model(input_ids=ids[:1, :_PROBE_TOKENS], use_cache=False).logits
    finally:
        hook.remove()
    return logits, seen[-1] if seen else None


def frozen_head(model: nn.Module) -> nn.Linear | None:
    """Return the model's head where it is a linear map that nothing trains and nobody has a hook on, else None."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        return None
    # a product with its weight alone would pass hooks by
    if number_of_hooks(head):
        return None
    return head


def labeled(
    model: nn.Module,
    args: tuple[Any, ...],
    inputs: Mapping[str, Any],
    labels: Tensor,
    padding_free: bool | str,
    *,
    always: bool = False,
) -> Labeled:
    """Return the batch; `inputs` are those of the backbone, labels (batch, T), `padding_free` as in `AdapterConfig`.

    With `always`, a batch without padding is laid out in one row too, where the model allows.

    Raises:
        UserError: when `padding_free` is True and the batch cannot be packed.
    """
    packed = None if args else pack(model, dict(inputs), labels != IGNORED, padding_free, always=always)
    head = model.get_output_embeddings()  # type: ignore[operator]
    targets = labels[:, 1:].to(head.weight.device)
    mask = targets != IGNORED
    return Labeled(args, packed.inputs if packed else dict(inputs), packed, mask, targets[mask])
