"""Callbacks of ours in every `transformers.Trainer` that is made from now on, TRL's included."""

from __future__ import annotations

from typing import Any


def join(callback: type[Any]) -> None:
    """Let every Trainer that is made from now on have a callback of this class.

    To be called when an adapter is made, not while modules are imported: transformers may be half imported when PEFT
    imports the tuner.
    """
    from transformers.trainer import DEFAULT_CALLBACKS

    callbacks: list[Any] = DEFAULT_CALLBACKS
    if callback not in callbacks:
        callbacks.append(callback)
