"""All targets, in the order in which they are offered; a new one adds a line here."""

from __future__ import annotations

from loraplex.export.gguf import GGUF
from loraplex.export.merged import MERGED
from loraplex.export.peft import PEFT
from loraplex.export.subject import Subject
from loraplex.export.vllm import VLLM

TARGETS = {target.name: target for target in (PEFT, VLLM, MERGED, GGUF)}


def refusals(subject: Subject) -> dict[str, str | None]:
    """Return by target why the adapter has no exact form there, or None where it has one."""
    return {name: target.refuse(subject) for name, target in TARGETS.items()}
