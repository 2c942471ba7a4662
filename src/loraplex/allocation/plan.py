"""Plan: which rank every site gets. Data: printable, diffable, written by hand if need be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loraplex.errors import UserError
from loraplex.files import write_json
from loraplex.option_values import is_whole


@dataclass(frozen=True)
class Plan:
    """Ranks by site name; 0 means that the site is not adapted."""

    ranks: Mapping[str, int]

    def __post_init__(self) -> None:
        """Refuse ranks that are not whole numbers of at least 0."""
        for site, rank in self.ranks.items():
            if not is_whole(rank) or rank < 0:
                raise UserError(f"plan gives rank {rank!r} to {site}: give a whole number, 0 leaves the site out")

    @property
    def adapted(self) -> list[str]:
        """Names of the sites with a rank above 0."""
        return [site for site, rank in self.ranks.items() if rank > 0]

    def save(self, path: Path) -> None:
        """Write the plan as JSON, one site a line."""
        write_json(path, {"ranks": dict(self.ranks)})

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan.

        Raises:
            UserError: when the file is missing, is not JSON or does not hold ranks by site.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"no plan at {path}") from None
        except (IsADirectoryError, UnicodeDecodeError):
            raise UserError(f"{path} is no plan: give a file such as a run's plan.json") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
        if not isinstance(content, dict) or not isinstance(content.get("ranks"), dict):
            raise UserError(f'{path}: a plan is {{"ranks": {{site: rank}}}}')
        return cls(content["ranks"])
