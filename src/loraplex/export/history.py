"""What is known of how an adapter came about: from its own folder, and from the run folder around it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loraplex.models.fingerprint import FILE
from loraplex.run_paths import RunPaths


@dataclass(frozen=True)
class History:
    """Facts for a model card; what is not recorded is empty."""

    commit: str | None = None
    """Of the base model, where it came from a hub."""
    base_parameters: int | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    """The recipe of the run as it was resolved."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """metrics.json of the run."""

    @property
    def data(self) -> list[str]:
        """The sources of the training rows; of local files the name alone."""
        sources = self.recipe.get("data", {}).get("train") or []
        names = [sources] if isinstance(sources, str) else list(sources)
        return [Path(name).name if Path(name).expanduser().is_absolute() else str(name) for name in names]


def read_history(folder: Path) -> History:
    """Return what the adapter folder and the run around it say; a damaged file counts as absent."""
    base, run = _json(folder / FILE), RunPaths(folder.parent)
    if folder.name != run.adapter.name:
        return History(base.get("commit"), base.get("parameters"))
    return History(base.get("commit"), base.get("parameters"), _yaml(run.recipe), _json(run.metrics))


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
