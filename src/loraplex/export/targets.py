"""All targets, in the order in which they are offered; a new one adds a line here."""

from __future__ import annotations

from loraplex.export.gguf import GGUF
from loraplex.export.merged import MERGED
from loraplex.export.peft import PEFT
from loraplex.export.subject import ExportCandidate, classifies
from loraplex.export.target import Target
from loraplex.export.vllm import VLLM

TARGETS = {target.name: target for target in (PEFT, VLLM, MERGED, GGUF)}


def refusal(target: Target, subject: ExportCandidate) -> str | None:
    """Return why the adapter has no exact form at the target, or None where it has one."""
    return classifies(subject) or target.refuse(subject)


def refusals(subject: ExportCandidate) -> dict[str, str | None]:
    """Return the same by target."""
    return {name: refusal(target, subject) for name, target in TARGETS.items()}
