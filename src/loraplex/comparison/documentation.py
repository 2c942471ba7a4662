"""The keys of a comparison with their doc lines, read from the source of their dataclasses."""

from __future__ import annotations

from pathlib import Path

from loraplex.training.documentation import Key, documented_fields

SOURCE = Path(__file__).with_name("recipe.py")


def comparison_keys() -> dict[str, list[Key]]:
    """Return the keys by the title of their group."""
    source = SOURCE.read_text(encoding="utf-8")
    return {
        "Keys of a comparison": documented_fields(source, "CompareOptions"),
        "Keys of an arm": documented_fields(source, "ArmOptions", "arms.NAME"),
    }
