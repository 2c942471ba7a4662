"""The border to PEFT: one tuner, one layer wrapper, one config for every method. Importing it registers with PEFT."""

from loraplex.tuner import registration

__all__ = ["registration"]
