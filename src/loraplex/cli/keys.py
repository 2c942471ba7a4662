"""The keys of recipes and comparisons as the command line shows them, without importing what reads recipes.

They are kept in keys.json, so that every help page is there in the smallest installation. `python -m loraplex.cli.keys`
writes the file from the dataclasses; a test compares the two.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

from loraplex.documentation import Key, documented

FILE = Path(__file__).with_name("keys.json")
# The titles of the groups that only `loraplex compare` knows.
COMPARISON = ("Keys of a comparison", "Keys of an arm")


@cache
def known_keys() -> dict[str, list[Key]]:
    """Return the keys as written in keys.json, by the title of their group on a help page."""
    groups = json.loads(FILE.read_text(encoding="utf-8"))
    return {
        title: [Key(**{**key, "choices": tuple(key.get("choices", ()))}) for key in keys]
        for title, keys in groups.items()
    }


def known_key(path: str) -> Key:
    """Return the key with this path."""
    return next(key for keys in known_keys().values() for key in keys if key.path == path)


def collected_keys() -> dict[str, list[Key]]:
    """Return the same from the dataclasses."""
    from loraplex.comparison.comparison_recipe import ArmOptions, CompareOptions
    from loraplex.training.reading import ADAPTER, SECTIONS
    from loraplex.training.recipe import Recipe
    from loraplex.tuner.config import AdapterConfig

    sections = {**SECTIONS, ADAPTER: AdapterConfig}
    top = [key for key in documented(Recipe) if key.path not in sections]
    return {
        "Keys of a recipe": top,
        **{f"Keys of '{name}'": documented(options, name) for name, options in sections.items()},
        COMPARISON[0]: documented(CompareOptions),
        COMPARISON[1]: documented(ArmOptions, "arms.NAME"),
    }


def as_json(groups: dict[str, list[Key]]) -> str:
    """Return the text of keys.json: a line for each key, with what is not as usual."""
    usual = {entry.name: entry.default for entry in dataclasses.fields(Key)}
    lines = []
    for title, keys in groups.items():
        changed = [{name: value for name, value in vars(key).items() if value != usual[name]} for key in keys]
        rows = ",\n".join(f"  {json.dumps(key, ensure_ascii=False)}" for key in changed)
        lines.append(f"{json.dumps(title)}: [\n{rows}\n]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(as_json(collected_keys()), encoding="utf-8")
