"""The border to PEFT: one tuner, one layer wrapper, one config for every method."""

# PEFT first: importing it triggers our registration, which needs this package to be importable already
import peft  # noqa: F401
