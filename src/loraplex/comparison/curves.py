"""Long series and long lists of sites, brought to a size that a chart can show."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

_POINTS = 160
# Share of a curve over which its points are averaged.
_SMOOTHING = 0.02
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


class Cell(NamedTuple):
    """One place of a rank map."""

    layer: str
    kind: str
    rank: float


def course(loss: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most 160 points of a learning curve, each the mean of its neighbors weighted by exp(−d²/2w²).

    Values that are not finite are left out: a chart has no place for them.
    """
    finite = [(step, value) for step, value in loss if math.isfinite(value)]
    stride = max(1, math.ceil(len(finite) / _POINTS))
    chunks = [finite[start : start + stride] for start in range(0, len(finite), stride)]
    steps = [chunk[-1][0] for chunk in chunks]
    values = [fmean(value for _, value in chunk) for chunk in chunks]
    width = max(0.5, _SMOOTHING * len(values))
    reach = math.ceil(3 * width)
    points = []
    for center, step in enumerate(steps):
        near = range(max(0, center - reach), min(len(values), center + reach + 1))
        weights = [math.exp(-(((place - center) / width) ** 2) / 2) for place in near]
        mean = sum(weight * values[place] for weight, place in zip(weights, near, strict=True)) / sum(weights)
        points.append((step, round(mean, 4)))
    return points


def rank_map(ranks: Sequence[Mapping[str, int]]) -> list[Cell]:
    """Return a cell per site with the mean of its ranks over the runs, by layer and then in the order of the model.

    The first number in a site's name is its layer, what comes after it the kind of matrix.
    """
    of_site: dict[str, list[int]] = {}
    for of_run in ranks:
        for site, rank in of_run.items():
            of_site.setdefault(site, []).append(rank)
    cells = [Cell(*_layer_and_kind(site), fmean(values)) for site, values in of_site.items()]
    # Sites outside the layers, such as an embedding, come last.
    return sorted(cells, key=lambda cell: int(cell.layer) if cell.layer.isdigit() else math.inf)


def _layer_and_kind(site: str) -> tuple[str, str]:
    found = _LAYER.search(site)
    if found is None:
        return "–", site
    return found[1], site[found.end() :]
