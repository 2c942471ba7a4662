"""The options of Echo-LoRA: every choice that the paper's abstract leaves open, with its default."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from loraplex.errors import UserError, nearest
from loraplex.objectives.pooling import POOLS
from loraplex.option_values import is_number, is_whole

_CHOICES = {
    "pool": POOLS,
    "signal": ("pooled", "none", "zeros", "random", "another"),
    "injection": ("additive", "multiplicative", "output"),
    "routing": ("step", "sample"),
    "second_pass": ("auto", "full"),
}
_SHARES = ("probability", "target_dropout")
_NOT_NEGATIVE = ("weight_on", "weight_off", "weight_distillation", "ramp")
_POSITIVE = ("temperature", "learning_rate")


@dataclass(frozen=True)
class EchoOptions:
    """What the objective echo does; the defaults are ours, the paper's are not public.

    Raises:
        UserError: for values out of range, and for pooling of answers without a loss on the plain pass.
    """

    sources: int | tuple[int, ...] = 4
    """Boundaries that are pooled: how many, evenly spaced in the last third, or which (1 is after the first block)."""
    targets: tuple[int, ...] | None = None
    """Blocks whose adapted modules get the echo (0 is the first); all of the first third when absent."""
    pool: Literal["prompt", "last_prompt", "answer", "all"] = "prompt"
    """Tokens whose states are pooled. With answers among them the echo sees what is to be predicted."""
    signal: Literal["pooled", "none", "zeros", "random", "another"] = "pooled"
    """What takes the place of the echo, as a control: nothing, zeros, a fixed random vector, another sample's echo."""
    injection: Literal["additive", "multiplicative", "output"] = "additive"
    """a + g u, a ⊙ (1 + g tanh u), both in the rank space, or y + g u."""
    bottleneck: int = 64
    """Width b of the shared trunk."""
    gate_bias: float = -2.0
    """Where the gates start: sigmoid of it."""
    routing: Literal["step", "sample"] = "step"
    """What is drawn for the second pass: whole steps, or samples within a step."""
    probability: float = 0.5
    """Of the second pass."""
    second_pass: Literal["auto", "full"] = "auto"
    """auto: only from the first injected position on, where that is exact: a model on sdpa with full attention in every
    layer, no dropout, no noise on embeddings (NEFTune), no checkpoint, batches with an attention mask padded on the
    right, which `padding_free` is allowed to take out; full: all of it.
    What is logged as computed_again tells how much it was."""
    target_dropout: float = 0.1
    """Share of the target sites that get nothing in a step."""
    weight_on: float = 0.5
    """λ_on of the loss of the pass with echo."""
    weight_off: float = 0.5
    """λ_off of the loss of the plain pass, which is what is deployed."""
    weight_distillation: float = 0.5
    """λ_kd of the distillation from the pass with echo into the plain one, after the ramp."""
    ramp: float = 0.1
    """Steps in which λ_kd rises from 0; below 1 it is a share of all steps."""
    temperature: float = 1.0
    """τ of the distillation."""
    learning_rate: float = 1e-3
    """Of the echo's networks at the peak of the schedule; they have no weight decay."""

    def __post_init__(self) -> None:
        """Normalize and check."""
        if not isinstance(self.sources, int):
            object.__setattr__(self, "sources", _indices("sources", self.sources, 1))
        elif isinstance(self.sources, bool) or self.sources < 1:
            raise UserError(f"sources is {self.sources!r}: give a number of at least 1, or a list of boundaries")
        if self.targets is not None:
            object.__setattr__(self, "targets", _indices("targets", self.targets, 0))
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} is {value!r}: choose {', '.join(known)}.{nearest(str(value), known)}")
        if not is_whole(self.bottleneck) or self.bottleneck < 1:
            raise UserError(f"bottleneck is {self.bottleneck!r}: give a whole number of at least 1")
        self._check_numbers()
        if self.pool in ("answer", "all") and self.weight_off == 0:
            raise UserError(
                f"pool is '{self.pool}', which shows the echo the answer, and weight_off is 0: the plain pass would "
                "learn from no label; set weight_off above 0, or pool to prompt"
            )

    def _check_numbers(self) -> None:
        for name in (*_SHARES, *_NOT_NEGATIVE, *_POSITIVE, "gate_bias"):
            value = getattr(self, name)
            if not is_number(value) or not math.isfinite(value):
                raise UserError(f"{name} is {value!r}: give a number")
            if name in _SHARES and not 0 <= value <= 1:
                raise UserError(f"{name} is {value!r}: give a number from 0 to 1")
            if (name in _NOT_NEGATIVE and value < 0) or (name in _POSITIVE and value <= 0):
                raise UserError(
                    f"{name} is {value!r}: give a number {'above' if name in _POSITIVE else 'of at least'} 0"
                )
        if self.weight_on == 0 and self.weight_off == 0:
            raise UserError("weight_on and weight_off are both 0: nothing would learn from the labels")

    @property
    def passes(self) -> float:
        """Forward passes of a training step on average; a second pass over some samples is one over all."""
        return 1 + (self.probability if self.routing == "step" else float(self.probability > 0))

    @property
    def most_passes(self) -> float:
        """Forward passes whose activations are kept at the same time."""
        return 2.0 if self.probability > 0 else 1.0


def _indices(name: str, values: Any, least: int) -> tuple[int, ...]:
    given = tuple(values) if isinstance(values, (list, tuple)) else (None,)
    if not given or any(not is_whole(i) or i < least for i in given):
        raise UserError(f"{name} is {values!r}: give a list of whole numbers of at least {least}")
    return tuple(sorted(set(given)))
