"""The allocation axis: sites, plans and who decides them. Importing this package registers every allocator."""

from loraplex.allocation import alora, hetero, uniform

__all__ = ["alora", "hetero", "uniform"]
