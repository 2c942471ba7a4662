"""What the tuner knows of an adapter beside its configuration: what training has made of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class AdapterState:
    """The state of one adapter; the tuner owns it, the adapter's config refers to it (`AdapterConfig.state`)."""

    live: bool = False
    """Whether gates may be closed that are not finished yet: a checkpoint must carry them."""
    driven: bool = False
    """Whether an allocation is under way: somebody calls it after every optimizer step."""
    finished_ranks: dict[str, int] | None = None
    """Ranks by full site name once an allocation has finished, see `LoraplexTuner.finish`; None before that."""
    other_modules: list[str] = field(default_factory=list)
    """Names of all modules of the base model, kept from then on."""
    transposed: bool = False
    """Whether a site stores its weight as (in, out), as GPT-2's Conv1D does: PEFT's config says so."""
    adds_loss: bool = False
    """Whether one of its sites adds a loss of its own (Hydra's balance); if none does, a forward asks no layer."""
