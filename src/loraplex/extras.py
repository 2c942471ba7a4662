"""The extras of the installation, as in `pip install 'loraplex[train]'`: which of their packages are missing.

What belongs to an extra stands in pyproject.toml alone; here it is read from the installed package's metadata. Only the
standard library is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from loraplex.errors import UserError

_REQUIREMENT = re.compile(r"""([\w.-]+)(?:\[([\w.,-]+)\])?[^;]*;.*\bextra\s*==\s*['"]([\w.-]+)['"]""")


def require(what: str, *extras: str, only: str | None = None) -> None:
    """Refuse `what` when a package of these extras is not installed, or, where `only` names one, when that is not.

    A loraplex that is not installed itself, but imported from its source, is let through.

    Raises:
        UserError: in one line, with the packages and the command that installs them.
    """
    missing = {
        extra: absent for extra in extras if (absent := [name for name in _missing(extra) if only in (None, name)])
    }
    if missing:
        *others, last = dict.fromkeys(name for absent in missing.values() for name in absent)
        names = f"{', '.join(others)} and {last}, which are" if others else f"{last}, which is"
        raise UserError(f"{what} needs {names} not installed: pip install 'loraplex[{','.join(missing)}]'")


def _missing(extra: str) -> Iterator[str]:
    """Yield the packages of `extra`, and of the extras that it includes, that are not installed."""
    # Half of the time that a help page takes, which asks for no extra.
    from importlib.metadata import PackageNotFoundError, requires, version

    def is_installed(name: str) -> bool:
        try:
            version(name)
        except PackageNotFoundError:
            return False
        return True

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
        elif not is_installed(name):
            yield name
