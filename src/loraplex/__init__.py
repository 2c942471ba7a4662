"""loraplex: the LoRA family on top of PEFT.

The public names are loaded on first use, so that `import loraplex` costs nothing and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loraplex import peft_import

if TYPE_CHECKING:
    from loraplex.adapters.add import Add as Add
    from loraplex.adapters.lora import LoRA as LoRA
    from loraplex.adapters.magnitude import Magnitude as Magnitude
    from loraplex.adapters.registry import Adapter as Adapter
    from loraplex.allocation.alora import ALoRA as ALoRA
    from loraplex.allocation.hetero import Hetero as Hetero
    from loraplex.errors import UserError as UserError
    from loraplex.models.loading import load_model as load_model
    from loraplex.models.loading import load_tokenizer as load_tokenizer
    from loraplex.objectives.echo import Echo as Echo
    from loraplex.tuner.config import AdapterConfig as AdapterConfig
    from loraplex.tuner.counting import print_trainable_parameters as print_trainable_parameters
    from loraplex.tuner.drive import drive_allocation as drive_allocation
    from loraplex.tuner.loading import load_adapter as load_adapter

__version__ = "0.1.0.dev0"

# Public name -> the module that defines it.
_HOMES = {
    "ALoRA": "loraplex.allocation.alora",
    "Hetero": "loraplex.allocation.hetero",
    "Adapter": "loraplex.adapters.registry",
    "AdapterConfig": "loraplex.tuner.config",
    "Add": "loraplex.adapters.add",
    "Echo": "loraplex.objectives.echo",
    "LoRA": "loraplex.adapters.lora",
    "Magnitude": "loraplex.adapters.magnitude",
    "UserError": "loraplex.errors",
    "drive_allocation": "loraplex.tuner.drive",
    "load_adapter": "loraplex.tuner.loading",
    "load_model": "loraplex.models.loading",
    "load_tokenizer": "loraplex.models.loading",
    "print_trainable_parameters": "loraplex.tuner.counting",
}

__all__ = [
    "ALoRA",
    "Adapter",
    "AdapterConfig",
    "Add",
    "Echo",
    "Hetero",
    "LoRA",
    "Magnitude",
    "UserError",
    "__version__",
    "drive_allocation",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "print_trainable_parameters",
]

peft_import.install()


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
