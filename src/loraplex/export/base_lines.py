"""The lines of a loading snippet that get the base model and its tokenizer."""

from __future__ import annotations

from pathlib import Path

from loraplex.models.embedded import FOLDER_NAME
from loraplex.models.loading import EMBEDDED


def base_lines(base: str) -> str:
    """Return lines of Python that bind `base` to the model and `tokenizer` to its tokenizer.

    The embedded model has no name outside loraplex, so only its lines import it.
    """
    if is_embedded(base):
        return (
            "from loraplex import load_model, load_tokenizer\n\n"
            f'base, tokenizer = load_model("{EMBEDDED}"), load_tokenizer("{EMBEDDED}")'
        )
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")'
    )


def is_embedded(base: str) -> bool:
    """Whether `base` names the embedded model, or the folder it has on some machine."""
    return base == EMBEDDED or Path(base).name == FOLDER_NAME
