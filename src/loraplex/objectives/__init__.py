"""The objective axis: what is minimized while training. Importing this package registers every objective."""

from loraplex.objectives import plain

__all__ = ["plain"]
