"""The objective axis: what is minimized while training. Importing this package registers every objective."""

from loraplex.objectives import echo, plain

__all__ = ["echo", "plain"]
