"""Which residual edges an allocation wants shortcuts on, and how large."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loraplex.allocation.sites import EDGES, FROM_BEFORE, Site
from loraplex.errors import UserError, nearest


@dataclass(frozen=True)
class Edges:
    """Edges by kind or by full name; rank and alpha of those that no pattern names."""

    chosen: tuple[str, ...]
    r: int
    alpha: float

    def among(self, sites: Iterable[Site]) -> list[Site]:
        """Return those of the edges `sites` that are chosen.

        Raises:
            UserError: for a full name that none of them has.
        """
        known = list(sites)
        names = [site.name for site in known]
        for name in self.chosen:
            if "." in name and not any(_ends(other, name) for other in names):
                raise UserError(f"shortcuts names '{name}', which this model does not have.{nearest(name, names)}")
        return [site for site in known if any(_ends(site.name, name) for name in self.chosen)]


def edges_of(path: str, blocks: int, width: int) -> list[Site]:
    """Return every edge of the blocks in the module list `path`, `width` features wide.

    Nothing comes from the block before into the first one.
    """
    named = [(index, kind) for index in range(blocks) for kind in EDGES if index or kind != FROM_BEFORE]
    return [Site(f"{path}.{index}.{kind}", width, width, bias=False) for index, kind in named]


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")
