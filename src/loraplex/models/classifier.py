"""Models with a classification head: loaded with names for the classes, and told apart from language models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from loraplex.compat.peft import SEQ_CLS_HEAD_NAMES
from loraplex.errors import UserError
from loraplex.models.loading import DType, load_pretrained, load_tokenizer

HEADS = tuple(SEQ_CLS_HEAD_NAMES)
"""What transformers calls the modules that PEFT trains in full for sequence classification."""


def load_classifier(name: str, classes: Sequence[str], dtype: DType = "auto", seed: int = 0) -> PreTrainedModel:
    """Return the model `name` with a head for these classes, in evaluation mode; `seed` initializes a fresh head.

    Raises:
        UserError: when there is no such model, it cannot be read, or weights are missing beside the head.
    """
    # transformers draws a fresh head from torch's generator
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, missing = load_pretrained(AutoModelForSequenceClassification, name, dtype, **_names(classes))
    absent = [key for key in missing if key.partition(".")[0] not in HEADS]
    if absent:
        raise UserError(
            f"model '{name}' lacks {len(absent)} of its weights beside the head ({' or '.join(HEADS)}), '{absent[0]}' "
            "for one: take a model whose head is all that is new"
        )
    if model.config.pad_token_id is None:
        # decoders classify by the last token that is not padding
        model.config.pad_token_id = load_tokenizer(name).pad_token_id
    return model


def classifier_from_config(config: PretrainedConfig, classes: Sequence[str], dtype: torch.dtype) -> PreTrainedModel:
    """Return the same model with random weights."""
    config = deepcopy(config)
    for key, value in _names(classes).items():
        setattr(config, key, value)
    model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    return model


def classes_of(model: nn.Module) -> tuple[str, ...] | None:
    """Return the names of the classes that a model, adapted or not, tells apart; None for a language model."""
    unwrap = getattr(model, "get_base_model", None)
    base: Any = unwrap() if callable(unwrap) else model
    if not isinstance(base, PreTrainedModel) or not any(True for _ in head_parameters(base)):
        return None
    names: Any = base.config.id2label
    return tuple(str(names[index]) for index in range(len(names)))


def head_parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of the classification head by their names; none for a language model."""
    for head in HEADS:
        for name, parameter in getattr(model, head, nn.Module()).named_parameters():
            yield f"{head}.{name}", parameter


def _names(classes: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)}}
