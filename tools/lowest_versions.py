"""Print a constraints file: every dependency of the core install in pyproject.toml at its lowest version.

    python tools/lowest_versions.py torch==2.13.0

Packages that are given take that version in place of the lowest one.
"""

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lowest(requirements: list[str]) -> dict[str, str]:
    """Return the lower bound of each requirement by the name of its package.

    Raises:
        SystemExit: for a requirement without a lower bound, which nothing could test.
    """
    found = {}
    for requirement in requirements:
        # markers of platforms do not change the bound
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[.*?\])?[^;]*?>=\s*([0-9][^,;\s]*)", requirement)
        if match is None:
            sys.exit(f"pyproject.toml: '{requirement}' has no lower bound: write {requirement.split()[0]}>=VERSION")
        found[match[1].lower()] = match[2]
    return found


def main(given: list[str]) -> None:
    """Print one `package==version` a line."""
    found = lowest(tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"])
    found |= dict(pin.lower().split("==", 1) for pin in given)
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in sorted(found.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
