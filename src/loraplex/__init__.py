"""loraplex: the LoRA family on top of PEFT.

The public names are those of `loraplex.api`. They are loaded when the first of them is used, so that `import loraplex`
and the command line's help cost nothing and import no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraplex.api import *  # noqa: F403  (the names stand once, in that file)

__version__ = "0.1.0.dev0"


def __getattr__(name: str) -> Any:
    """Return a public name, or `__all__`, the list of them; PEFT knows loraplex's own type from then on."""
    if name == "__all__":
        return __dir__()
    # Whoever looks for a module's special attributes (inspect, pickle, doctest) does not want torch for it.
    if not name.startswith("_"):
        api = importlib.import_module("loraplex.api")
        if name in vars(api):
            return vars(api)[name]
    raise AttributeError(f"module 'loraplex' has no attribute '{name}'")


def __dir__() -> list[str]:
    """List the public names, also those that are not loaded yet."""
    api = importlib.import_module("loraplex.api")
    return sorted({"__version__", *(name for name in vars(api) if not name.startswith("_"))})
