"""What acts between the steps of a training: allocations, closed ranks, learning rates and objectives.

`registry` has the one list of tuners that are acted on, and the one pair of optimizer hooks; `callback` is the one
callback in every Trainer. Whatever acts is a `TrainingHook` (`contracts`), one file each.
"""

# The tuner first: its registration imports this package's registry, which imports the tuner's parts.
import loraplex.tuner  # noqa: F401
