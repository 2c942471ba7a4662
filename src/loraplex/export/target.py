"""What a target is: four functions that `export` calls in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from loraplex.export.subject import ExportCandidate

Logits = list[Tensor]
"""(tokens, vocabulary) of every row, in float32 on the CPU."""


@dataclass(frozen=True)
class WriteOptions:
    """How a target writes."""

    base: str
    """The base model as `load_model` takes it."""
    dtype: torch.dtype
    """Of the tensors that are written."""


@dataclass(frozen=True)
class Target:
    """A form in which a finished adapter can be deployed."""

    name: str
    summary: str
    refuse: Callable[[ExportCandidate], str | None]
    """Why an adapter has no exact form here, with what can be done instead; None when it has one. Asked twice: before
    the weights are read, and with the sites and their ranks."""
    write: Callable[[PeftModel, Path, WriteOptions], list[str]]
    """Write the result into an empty folder and return sentences about what it is. The model, in float32, may be used
    up."""
    reload: Callable[[Path, str, Sequence[Sequence[int]]], dict[str, Logits]]
    """Read the folder back with the target's own loaders, on the base of that name: {loader: logits of the rows}."""
    snippet: Callable[[Path, str], str]
    """The lines of Python that load the result, for its model card; they run in its folder."""
    usage: Callable[[Path, str], str]
    """How to serve it, as a command of the engine; "" where the snippet is all."""
    dtype: torch.dtype | None = torch.float32
    """What is written unless asked for otherwise; None is the data type of the base model."""
