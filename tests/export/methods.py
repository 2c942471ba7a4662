"""The methods that exports are tested with: all that are registered."""

from loraplex import Adapter
from loraplex.adapters.registry import Axis, incompatibility
from loraplex.methods import REGISTRY


def legal_adapters() -> list[Adapter]:
    """Every legal pair of factors and combine, with their defaults."""
    pairs = [(f, c) for f in REGISTRY.members(Axis.FACTORS) for c in REGISTRY.members(Axis.COMBINE)]
    return [Adapter(f.options(), c.options()) for f, c in pairs if incompatibility(f, c) is None]


def name(adapter: Adapter) -> str:
    return "-".join(method.name for method in adapter.methods)
