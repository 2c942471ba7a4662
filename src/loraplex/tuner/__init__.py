"""The border to PEFT: one tuner, one layer wrapper, one config for every method.

Whoever imports anything of it has made PEFT know loraplex's own type.
"""

from loraplex.tuner import registration as registration
