"""Puts a model's modules back as they were, when an adapter cannot be added or loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Restore the tree of modules, their attributes and `requires_grad` when the block raises; copies no tensor."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    # shared containers (peft_config, _modules) keep their identity, so their content is restored in place
    containers: list[tuple[Any, Any]] = [
        (value, value.copy())
        for _, attributes in before
        for value in attributes.values()
        if isinstance(value, (dict, list, set))
    ]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
        for container, content in containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
