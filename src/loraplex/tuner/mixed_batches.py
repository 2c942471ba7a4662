"""Mixed batches: `adapter_names` gives every row of a batch its own adapter ('__base__' for none)."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from loraplex.compat.peft import AuxiliaryTrainingWrapper
from loraplex.errors import UserError, nearest
from loraplex.tuner.layer import AdapterLayer
from loraplex.tuner.shortcuts.layers import ShortcutLayer

BASE = "__base__"
"""The name of a row that no adapter changes."""


@contextlib.contextmanager
def adapter_per_row(
    tuner: nn.Module, names: Sequence[str], known: Collection[str], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Let every site under `tuner` see `names`; `kwargs` are those of the call, which may ask for beams.

    Raises:
        UserError: while training, or when a name is not one of `known`.
    """
    if tuner.training:
        raise UserError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = sorted(set(names) - set(known) - {BASE})
    if unknown:
        raise UserError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}.{nearest(unknown[0], known)}"
        )
    for module in tuner.modules():
        if isinstance(module, ShortcutLayer) and (own := [name for name in names if module.is_open(name)]):
            raise UserError(
                f"adapter '{own[0]}' has shortcuts, which cannot act on some rows of a batch only: call the model once "
                "for every adapter"
            )
    hook = partial(_pass_names, names=list(names), repeats=_repeats(tuner, kwargs))
    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in tuner.modules()
        if isinstance(module, (AdapterLayer, AuxiliaryTrainingWrapper))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _repeats(tuner: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """Return how often generation repeats every row: for beams, or for several samples."""
    settings = kwargs.get("generation_config") or getattr(tuner, "generation_config", None)
    asked = [kwargs.get(key) or getattr(settings, key, None) or 1 for key in ("num_beams", "num_return_sequences")]
    return max(asked)


def _pass_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str], repeats: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # an encoder before the decoder sees the rows unrepeated
    if len(args[0]) == len(names) * repeats:
        names = [name for name in names for _ in range(repeats)]
    return args, {**kwargs, "adapter_names": names}
