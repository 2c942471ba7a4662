"""Registers our tuner with PEFT as soon as PEFT is imported, so that the order of the two imports does not matter.

`import loraplex` itself stays light: when PEFT is not there yet, a finder waits for it on `sys.meta_path`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def install() -> None:
    """Register now when PEFT is loaded, otherwise right after it is."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _WaitForPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForPeft())


def _register() -> None:
    importlib.import_module("loraplex.tuner.registration")


# Not derived from the classes of importlib.abc: that module costs as much as all the rest of `import loraplex`.
class _WaitForPeft:
    """Finds nothing by itself: wraps the loader of `peft`, and stays until that has been executed.

    Asking for the spec alone, as transformers does to see whether PEFT is installed, must not use it up.
    """

    def __init__(self) -> None:
        self.asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = cast(Any, _RegisterAfter(spec.loader))
        return spec


class _RegisterAfter:
    """PEFT's own loader, followed by our registration."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # what inspects the module later (importlib.resources, pickling) must see the real loader
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _WaitForPeft)]
        _register()
