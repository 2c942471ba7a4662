"""A Python process in which loraplex has no package of any extra: what it does there works in the bare installation.

Only loraplex's own imports are refused. PEFT and transformers have what they bring, which differs by their versions.
"""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

PYPROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))

_GUARD = """
import builtins, sys
_import = builtins.__import__
def _refuse(name, globals=None, locals=None, fromlist=(), level=0):
    ours = (globals or {{}}).get("__name__", "").startswith("loraplex")
    if ours and level == 0 and name.partition(".")[0] in {extras!r}:
        raise ModuleNotFoundError(f"loraplex imports {{name}}, which is in an extra", name=name)
    return _import(name, globals, locals, fromlist, level)
builtins.__import__ = _refuse
"""


def extras() -> set[str]:
    """Return the names under which the packages of all extras are imported."""
    project = PYPROJECT["project"]
    names = {
        _normal(re.match(r"[\w.-]+", requirement)[0])
        for group, requirements in project["optional-dependencies"].items()
        if group != "dev"
        for requirement in requirements
    }
    # An extra may ask for a newer one of what the tuner needs.
    names -= {"loraplex", *(_normal(re.match(r"[\w.-]+", needed)[0]) for needed in project["dependencies"])}
    found = packages_distributions().items()
    installed = {module for module, packages in found if names & {_normal(package) for package in packages}}
    return installed | {name.replace("-", "_") for name in names}


def run_bare(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with these arguments."""
    guarded = _GUARD.format(extras=extras()) + code
    return subprocess.run(
        [sys.executable, "-c", guarded, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
        check=False,
        timeout=300,
    )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pretend_installed(folder: Path, *requirements: str) -> Path:
    """Put into `folder` the metadata of a loraplex with these requirements; first on sys.path, it is the one found."""
    info = folder / "loraplex-9.dist-info"
    info.mkdir()
    lines = [
        "Metadata-Version: 2.4",
        "Name: loraplex",
        "Version: 9",
        *(f"Requires-Dist: {one}" for one in requirements),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    return folder
