"""The blocks of a transformer, found by the names of its adapted modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from loraplex.errors import UserError


@dataclass(frozen=True)
class Blocks:
    """A model's stack of blocks."""

    path: str
    """Name of the list in the model."""
    modules: nn.ModuleList
    of_site: Mapping[str, int]
    """Which block an adapted module lies in, for those that lie in one."""
    width: int
    """Features d of the residual stream."""


def find_blocks(model: nn.Module, sites: Iterable[str]) -> Blocks:
    """Return the outermost module list that holds most of the sites (named as modules of `model`).

    Raises:
        UserError: when no site lies in a module list.
    """
    place: dict[str, tuple[str, int]] = {}
    for site in sites:
        parts = site.split(".")
        for index, part in enumerate(parts):
            path = ".".join(parts[:index])
            if part.isdigit() and isinstance(model.get_submodule(path), nn.ModuleList):
                place[site] = (path, int(part))
                break
    if not place:
        raise UserError("no adapted module lies in a list of blocks, as a transformer has them: target some that do")
    path, _ = Counter(path for path, _ in place.values()).most_common(1)[0]
    modules = model.get_submodule(path)
    assert isinstance(modules, nn.ModuleList)
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    width = getattr(text, "hidden_size", None)
    if width is None:
        raise UserError(f"{type(model).__name__} does not say how wide its blocks are (config.hidden_size)")
    return Blocks(path, modules, {site: block for site, (own, block) in place.items() if own == path}, width)
