"""Writes the parts of a split, one file of JSON lines each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from loraplex.files import write_atomically


def write_parts(folder: Path, parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write NAME.jsonl for every part and say how many rows it has."""
    for name, part in parts.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        write_atomically(folder / f"{name}.jsonl", lines)
        click.echo(f"{len(part)} rows in {folder / name}.jsonl")
