"""The extras of the installation, as in `pip install 'loraplex[train]'`: which of their packages are missing.

What belongs to an extra stands in pyproject.toml alone; here it is read from the installed package's metadata. Only the
standard library is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from loraplex.errors import UserError

_REQUIREMENT = re.compile(r"""([\w.-]+)(?:\[([\w.,-]+)\])?[^;]*;.*\bextra\s*==\s*['"]([\w.-]+)['"]""")


def require(extra: str, what: str) -> None:
    """Refuse `what` when a package of `extra` is not installed; a loraplex that is not installed at all is let through.

    Raises:
        UserError: in one line, with the packages and the command that installs them.
    """
    absent = list(_missing(extra))
    if absent:
        are = "is" if len(absent) == 1 else "are"
        raise UserError(f"{what} needs {_listed(absent)}, which {are} not installed: pip install 'loraplex[{extra}]'")


def _missing(extra: str) -> Iterator[str]:
    """Yield the packages of `extra`, and of the extras that it includes, that are not installed."""
    try:
        requirements = requires("loraplex") or []
    except PackageNotFoundError:
        return
    for requirement in requirements:
        found = _REQUIREMENT.match(requirement)
        if found is None or found[3] != extra:
            continue
        name, included = found[1], found[2]
        if name == "loraplex":
            for other in included.split(","):
                yield from _missing(other)
        elif not _is_installed(name):
            yield name


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _listed(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
