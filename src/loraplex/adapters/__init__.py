"""The adapter axis. Importing this package registers every method; a new one adds one line here."""

from loraplex.adapters import add, hydra, lora, magnitude, prolora, tied, xs

__all__ = ["add", "hydra", "lora", "magnitude", "prolora", "tied", "xs"]
