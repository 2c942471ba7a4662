"""loraplex: the LoRA family on top of PEFT.

The public names are loaded on first use, so that `import loraplex` costs nothing and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraplex.adapters.add import Add as Add
    from loraplex.adapters.lora import LoRA as LoRA
    from loraplex.adapters.magnitude import Magnitude as Magnitude
    from loraplex.adapters.registry import Adapter as Adapter
    from loraplex.allocation.alora import ALoRA as ALoRA
    from loraplex.allocation.hetero import HeteroLoRA as HeteroLoRA
    from loraplex.errors import UserError as UserError
    from loraplex.models.loading import load_model as load_model
    from loraplex.models.loading import load_tokenizer as load_tokenizer
    from loraplex.objectives.echo import EchoLoRA as EchoLoRA
    from loraplex.training_hooks.allocation import start_allocation as start_allocation
    from loraplex.tuner.adapter_loading import load_adapter as load_adapter
    from loraplex.tuner.config import AdapterConfig as AdapterConfig
    from loraplex.tuner.counting import print_trainable_parameters as print_trainable_parameters

__version__ = "0.1.0.dev0"

# Public name -> the module that defines it.
_HOMES = {
    "ALoRA": "loraplex.allocation.alora",
    "HeteroLoRA": "loraplex.allocation.hetero",
    "Adapter": "loraplex.adapters.registry",
    "AdapterConfig": "loraplex.tuner.config",
    "Add": "loraplex.adapters.add",
    "EchoLoRA": "loraplex.objectives.echo",
    "LoRA": "loraplex.adapters.lora",
    "Magnitude": "loraplex.adapters.magnitude",
    "UserError": "loraplex.errors",
    "start_allocation": "loraplex.training_hooks.allocation",
    "load_adapter": "loraplex.tuner.adapter_loading",
    "load_model": "loraplex.models.loading",
    "load_tokenizer": "loraplex.models.loading",
    "print_trainable_parameters": "loraplex.tuner.counting",
}

__all__ = [
    "ALoRA",
    "Adapter",
    "AdapterConfig",
    "Add",
    "EchoLoRA",
    "HeteroLoRA",
    "LoRA",
    "Magnitude",
    "UserError",
    "__version__",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "print_trainable_parameters",
    "start_allocation",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use and keep it here."""
    if name not in _HOMES:
        raise AttributeError(f"module 'loraplex' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, also those not loaded yet."""
    return sorted({*globals(), *__all__})
