"""What was found out about a model by running it, for as long as nothing has changed that it depends on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn
from transformers import PreTrainedModel

from loraplex.compat.torch import number_of_hooks

T = TypeVar("T")


class Verdicts(Generic[T]):
    """One finding per model; it is looked for again when head, backbone, loss, forward or hooks on these are others."""

    def __init__(self) -> None:
        self._found: weakref.WeakKeyDictionary[nn.Module, tuple[Any, T]] = weakref.WeakKeyDictionary()

    def of(self, model: PreTrainedModel, find: Callable[[], T]) -> T:
        """Return the finding about a model; `find` looks for it where there is none that still holds."""
        now = _identity(model)
        known = self._found.get(model)
        if known is None or known[0] != now:
            found = find()
            # `find` may have put hooks on the model and taken them off again
            self._found[model] = known = (now, found)
        return known[1]


def _identity(model: PreTrainedModel) -> tuple[Any, ...]:
    head = model.get_output_embeddings()
    parts = [module for module in (model, model.base_model, head) if module is not None]
    weight = getattr(head, "weight", None)
    forward = getattr(model.forward, "__func__", model.forward)
    return (
        *((id(module), number_of_hooks(module), module.training) for module in parts),
        (id(weight), getattr(weight, "shape", None), id(forward), id(model.loss_function)),
    )
