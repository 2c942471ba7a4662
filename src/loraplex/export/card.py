"""The model card of an exported folder: only what is known, and lines of code that run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loraplex import __version__
from loraplex.export.base_lines import is_embedded
from loraplex.export.history import History
from loraplex.export.subject import ExportCandidate
from loraplex.export.target import Target
from loraplex.files import write_atomically
from loraplex.models.agreement import Agreement
from loraplex.models.embedded import PACKAGE, PACKAGE_VERSION

FILE = "README.md"
_MARK = "Exported by loraplex"


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from."""

    target: Target
    subject: ExportCandidate
    base: str
    history: History
    trainable: int
    """Numbers that the adapter has learned."""
    notes: Sequence[str]
    """What the target said about what it wrote."""
    agreements: Sequence[Agreement]
    given_up: Sequence[str] = ()
    """What was approximated before, in sentences; the agreements are with what that left."""


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write README.md into an exported folder."""
    header = yaml.safe_dump(_metadata(facts), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{header}---\n",
        f"# {facts.subject.name} adapter for {_base_title(facts.base)}\n",
        f"{_MARK} {__version__} to `{facts.target.name}`: {facts.target.summary}.\n",
        _loading(folder, facts),
        _facts(facts),
        _measured(facts.history.metrics),
        _given_up(facts.given_up),
        _verified(facts.agreements, "what that left" if facts.given_up else "the adapter as it was trained"),
    ]
    write_atomically(folder / FILE, "\n".join(section for section in sections if section))


def is_export(folder: Path) -> bool:
    """Whether the folder holds an export, by its card."""
    card = folder / FILE
    return card.is_file() and f"\n{_MARK} " in card.read_text(encoding="utf-8", errors="replace")


def _metadata(facts: CardFacts) -> dict[str, Any]:
    library = {"merged": "transformers", "gguf": "gguf"}.get(facts.target.name, "peft")
    tags = list(dict.fromkeys(("lora", facts.subject.name, "loraplex")))
    metadata: dict[str, Any] = {"library_name": library, "tags": tags}
    # hubs check that the name is one of theirs
    if not is_embedded(facts.base) and not Path(facts.base).expanduser().is_dir():
        metadata["base_model"] = facts.base
        metadata["base_model_relation"] = "merge" if facts.target.name == "merged" else "adapter"
    return metadata


def _base_title(base: str) -> str:
    if is_embedded(base):
        return f"SmolLM2-135M-Instruct out of {PACKAGE} {PACKAGE_VERSION} (4-bit blocks, dequantized)"
    return Path(base).name if Path(base).expanduser().is_dir() else base


def _loading(folder: Path, facts: CardFacts) -> str:
    text = f"## Loading\n\nIn this folder:\n\n```python\n{facts.target.snippet(folder, facts.base)}```\n"
    usage = facts.target.usage(folder, facts.base)
    return text + (f"\nTo serve it (not run here):\n\n```console\n$ {usage}\n```\n" if usage else "")


def _facts(facts: CardFacts) -> str:
    subject, history = facts.subject, facts.history
    factors, combine = subject.adapter.methods
    papers = dict.fromkeys((factors.paper, combine.paper))
    ranks = sorted(set(subject.ranks.values()))
    rows = {
        "base model": _base_title(facts.base),
        "base revision": history.commit or subject.config.revision or "not recorded",
        "method": f"{subject.name} ({', '.join(papers)})",
        "trained parameters": f"{facts.trainable:,}{_share(facts.trainable, history.base_parameters)}",
        "sites": f"{len(subject.ranks)}, rank {', '.join(map(str, ranks))}",
        "training data": ", ".join(history.data) or "not recorded",
        **_training(history),
        "written": "; ".join(facts.notes),
    }
    return "## What it is\n\n| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())


def _share(trainable: int, base: int | None) -> str:
    return f" ({trainable / base:.3%} of the base)" if base else ""


def _training(history: History) -> dict[str, str]:
    metrics, options = history.metrics, history.recipe.get("training", {})
    if "steps" not in metrics:
        return {}
    said = [f"{metrics['steps']} steps"]
    said += [f"{key.replace('_', ' ')} {options[key]}" for key in ("batch_size", "learning_rate") if key in options]
    if "seed" in history.recipe:
        said.append(f"seed {history.recipe['seed']}")
    return {"training": ", ".join(said)}


def _measured(metrics: dict[str, Any]) -> str:
    rows = []
    for when, title in (("before", "base model"), ("after", "with the adapter")):
        found = (metrics.get("accuracy") or {}).get(when)
        if found:
            rows.append(f"| {title} | {found['value']:.3f} ± {found['standard_error']:.3f} | {found['items']} |\n")
    if not rows:
        return ""
    return "## Measured in its run\n\n| | accuracy ± standard error | items |\n|---|---|---|\n" + "".join(rows)


def _given_up(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    lines = "".join(f"* {sentence}\n" for sentence in sentences)
    return f"## An approximation\n\nThis is not the adapter as it was trained:\n\n{lines}"


def _verified(agreements: Sequence[Agreement], reference: str) -> str:
    rows = "".join(
        f"| {found.reader} | {found.max_difference:.2g} | {found.mean_difference:.2g} | {found.largest_logit:.3g} "
        f"| {found.kl:.2g} | {found.same_top1:.2%} | {found.tokens:,} |\n"
        for found in agreements
    )
    return (
        f"## Verified\n\nReloaded and compared with {reference}, both in float32:\n\n"
        "| reloaded by | largest difference of a logit | mean | largest logit | KL (nats) | same top token | positions "
        f"|\n|---|---|---|---|---|---|---|\n{rows}"
    )
