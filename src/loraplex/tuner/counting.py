"""How many parameters an adapter trains, and how many of them its allocation lets it keep: two numbers, never one."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from peft import PeftModel

from loraplex.allocation.budget import Budget, expected_parameters, most_parameters
from loraplex.allocation.contracts import Candidate
from loraplex.tuner.candidates import candidates_of
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.model import LoraplexTuner


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model with an adapter."""

    trainable: int
    """All that are trained: with an allocation that moves ranks, the candidates, whether open or closed."""
    total: int
    """Those of the frozen model too."""
    candidates: int
    """Sites that the allocation chooses among; all adapted sites where it moves no ranks."""
    budget: Budget | None
    """What the allocation may leave open; None where it moves no ranks."""
    kept: int
    """Parameters that are left when the budget is spent: exact for a budget of parameters. For ranks and modules they
    depend on which are chosen, and this is what they are where all sites are chosen alike: `expected_parameters`."""
    most: int
    """The same where the dearest sites are chosen."""
    open: int
    """Parameters without those of the ranks that are closed now; before training none is."""
    beside: int = 0
    """Those of all these that no allocation moves: a head, biases, modules that are saved whole."""

    def __str__(self) -> str:
        """Say it in PEFT's form; what the allocation does not move is left out and said at the end."""
        every, kept, now = (number - self.beside for number in (self.trainable, self.kept, self.open))
        line = f"candidates: {every:,} parameters in {self.candidates:,} sites || budget: {self.budget}"
        if self.budget is not None and self.budget.unit != "parameters":
            line += f", about {kept:,} parameters"
        if now != every:
            line += f" || open now: {now:,} parameters"
        return f"{line} || beside them: {self.beside:,} parameters" if self.beside else line


def count_parameters(model: PeftModel, adapter_name: str | None = None) -> Parameters:
    """Return what a model's adapter (the active one where no name is given) trains and may keep."""
    trainable, total = model.get_nb_trainable_parameters()
    tuner = model.base_model
    name = model.active_adapter if adapter_name is None else adapter_name
    if not isinstance(tuner, LoraplexTuner):
        return Parameters(trainable, total, 0, None, *[trainable] * 3)
    config, candidates = tuner.peft_config[name], candidates_of(tuner, name)
    assert isinstance(config, AdapterConfig)
    all_of_them = sum(candidate.cost(candidate.ranks) for candidate in candidates)
    if not config.allocation.moves_ranks:
        return Parameters(trainable, total, len(candidates), None, *[trainable] * 3)
    gates, budget = config.allocation.start(candidates, config.rank_of)
    beside = trainable - all_of_them
    return Parameters(
        trainable=trainable,
        total=total,
        candidates=len(candidates),
        budget=budget,
        kept=beside + expected_parameters(candidates, {name: int(gate.sum()) for name, gate in gates.items()}, budget),
        most=beside + most_parameters(candidates, budget),
        open=beside + sum(candidate.cost(_open_ranks(candidate)) for candidate in candidates),
        beside=beside,
    )


def _open_ranks(candidate: Candidate) -> int:
    # without storage nothing has been closed yet
    return candidate.ranks if candidate.gate.is_meta else candidate.adapter.factors.open_ranks


def print_trainable_parameters(model: PeftModel) -> None:
    """Print what PEFT's own method prints, and under it what an allocation's candidates and its budget are.

    PEFT counts whatever has a gradient, closed ranks too, and gives tuners no say in that.
    """
    model.print_trainable_parameters()
    counted = count_parameters(model)
    if counted.budget is not None:
        sys.stdout.write(f"{counted}\n")
