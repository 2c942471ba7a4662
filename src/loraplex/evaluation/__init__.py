"""How good a model is: options compared by likelihood, classes told apart, or answers matched; with standard errors.

The names are loaded on first use, because most of them need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraplex.evaluation.answer_loss import LossScores as LossScores
    from loraplex.evaluation.answer_loss import score_answer_loss as score_answer_loss
    from loraplex.evaluation.classes import ClassScores as ClassScores
    from loraplex.evaluation.classes import score_classes as score_classes
    from loraplex.evaluation.generation import LLM_ADAPTERS as LLM_ADAPTERS
    from loraplex.evaluation.generation import Decoding as Decoding
    from loraplex.evaluation.generation import GenerationScores as GenerationScores
    from loraplex.evaluation.generation import score_generation as score_generation
    from loraplex.evaluation.options import OptionScores as OptionScores
    from loraplex.evaluation.options import score_options as score_options
    from loraplex.evaluation.results import Accuracies as Accuracies
    from loraplex.evaluation.results import Accuracy as Accuracy
    from loraplex.evaluation.results import majority_share as majority_share
    from loraplex.evaluation.results import write_records as write_records

_HOMES = {
    "Accuracies": "results",
    "Accuracy": "results",
    "ClassScores": "classes",
    "Decoding": "generation",
    "GenerationScores": "generation",
    "LLM_ADAPTERS": "generation",
    "LossScores": "answer_loss",
    "OptionScores": "options",
    "majority_share": "results",
    "score_answer_loss": "answer_loss",
    "score_classes": "classes",
    "score_generation": "generation",
    "score_options": "options",
    "write_records": "results",
}

__all__ = [
    "LLM_ADAPTERS",
    "Accuracies",
    "Accuracy",
    "ClassScores",
    "Decoding",
    "GenerationScores",
    "LossScores",
    "OptionScores",
    "majority_share",
    "score_answer_loss",
    "score_classes",
    "score_generation",
    "score_options",
    "write_records",
]


def __getattr__(name: str) -> Any:
    """Load a name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
