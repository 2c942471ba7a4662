"""The complete registry: importing this module registers the members of all axes."""

import loraplex.adapters
import loraplex.allocation
import loraplex.objectives  # noqa: F401  (imported for what it registers)
from loraplex.adapters.registry import REGISTRY

__all__ = ["REGISTRY"]
