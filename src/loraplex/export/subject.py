"""What the targets look at to say whether an adapter has an exact form there: capability flags, config, sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import TaskType

from loraplex.adapters.registry import Adapter, Capability, SaveFormat
from loraplex.tuner.config import AdapterConfig


@dataclass(frozen=True)
class ExportCandidate:
    """An adapter before it is exported, as far as it is known: sites and ranks only once they have been read."""

    config: AdapterConfig
    ranks: dict[str, int]
    """Open ranks by full module name; empty before the weights are read."""
    base: Any = None
    """The base model's transformers config; None where it is not at hand."""
    dequantize: bool = False
    """Whether a quantized base shall be taken as what its weights stand for."""
    shortcuts: tuple[str, ...] = ()
    """Residual edges with open ranks; empty before the weights are read."""

    @property
    def adapter(self) -> Adapter:
        """The method."""
        return self.config.adapter

    @property
    def name(self) -> str:
        """The method in words."""
        described = self.adapter.describe()
        if isinstance(described, str):
            return described
        return str(described.get("name") or f"{described['factors']} with {described['combine']}")

    @property
    def quantization(self) -> str | None:
        """How the base model's weights are and stay quantized; None where they are not, or nobody knows."""
        found = None if self.dequantize else getattr(self.base, "quantization_config", None)
        if not found:
            return None
        values = found if isinstance(found, dict) else found.to_dict()
        return str(values.get("quant_method") or "an unnamed method")


def has_shortcuts(subject: ExportCandidate) -> str | None:
    """Return why an adapter with shortcuts fits into no weight and no pair, or None where it has none."""
    allocation = subject.config.allocation
    # where ranks move, only the weights tell which edges are open
    if not subject.shortcuts and (allocation.edges is None or allocation.moves_ranks):
        return None
    named = f"{len(subject.shortcuts)} shortcuts, such as {subject.shortcuts[0]}," if subject.shortcuts else "shortcuts"
    return (
        f"'{subject.name}' has {named} between points of the residual stream, where the model has no weight and other "
        "programs add nothing; serve it with loraplex itself, or train without shortcuts"
    )


def classifies(subject: ExportCandidate) -> str | None:
    """Return why an adapter with a classification head is exported nowhere, or None for a language model's."""
    if subject.config.task_type != TaskType.SEQ_CLS:
        return None
    return (
        "it was trained with a classification head, and what is exported are language models; its own folder loads on "
        "AutoModelForSequenceClassification, with PeftModel.from_pretrained where it is LoRA or DoRA"
    )


def not_one_pair(subject: ExportCandidate) -> str | None:
    """Return why the adapter is not one pair (with or without a magnitude) per site, or None when it is."""
    if (reason := has_shortcuts(subject)) is not None:
        return reason
    if subject.adapter.peft_format is not SaveFormat.OWN:
        return None
    other = "'--to merged' writes the whole model" if subject.adapter.mergeable else without_weights(subject)
    return f"the weight change of '{subject.name}' is not one fixed pair of matrices per site; {other}"


def without_weights(subject: ExportCandidate) -> str:
    """Return what can be done with an adapter whose change no weight holds."""
    if Capability.ROUTED not in subject.adapter.methods[0].provides:
        return "serve it with loraplex itself"
    return (
        "serve it with loraplex itself, or let '--static-gates ROWS' fix its gates at their means over those rows, "
        "an approximation whose error is measured"
    )


def not_plain_lora(subject: ExportCandidate, reader: str) -> str | None:
    """Return why `reader`, which takes nothing but pairs (A, B), cannot take the adapter; None when it can."""
    if (reason := not_one_pair(subject)) is not None:
        return reason
    if subject.adapter.peft_format is SaveFormat.DORA:
        return (
            f"{reader} takes plain LoRA only, and the magnitudes of '{subject.name}' change the frozen weight in full "
            "rank: no pair of matrices is equal to it; '--to merged' writes the whole model, '--to peft' keeps it as "
            "DoRA for PEFT"
        )
    if beside := trained_beside(subject.config):
        return (
            f"{reader} takes pairs of matrices only, and this adapter changes {' and '.join(beside)} too; "
            "'--to merged' writes the whole model, '--to peft' keeps everything for PEFT"
        )
    return None


def trained_beside(config: AdapterConfig) -> list[str]:
    """Return in words what the adapter changes beside its sites."""
    found = []
    if config.bias != "none":
        found.append(f"biases (bias={config.bias!r})")
    if config.modules_to_save:
        found.append(f"whole modules ({', '.join(config.modules_to_save)})")
    if config.trainable_token_indices:
        found.append("rows of the embedding")
    return found
