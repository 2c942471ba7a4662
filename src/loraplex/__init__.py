"""loraplex: the LoRA family on top of PEFT.

The public names are loaded on first use, so that `import loraplex` costs nothing and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraplex.errors import UserError as UserError

__version__ = "0.1.0.dev0"

# Public name -> the module that defines it.
_HOMES = {
    "UserError": "loraplex.errors",
}

__all__ = ["UserError", "__version__"]


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
