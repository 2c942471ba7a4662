"""HydraLoRA's look at A and B (arXiv 2404.19245, figure 2): do they coincide between adapters, or part?

Every A and every B is one vector, flattened; the map is t-SNE over all of them. A map shows neighbourhoods and no
distances, so two numbers are taken from the vectors themselves, for A and for B apart:

    similarity = mean over sites and pairs of adapters of cos(v of the one, v of the other) at the same site
    silhouette = that of the adapter (or head) as a label; above 0 where vectors of one adapter lie closer together

The paper trains its adapters from one seed, so that their A start equal; then the similarity of A says how far they
have parted. From different seeds A are unrelated at the start, and stay so.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from loraplex.adapters.contracts import Factors
from loraplex.allocation.sites import kind_of
from loraplex.compat.peft import SAFETENSORS_WEIGHTS_NAME
from loraplex.errors import UserError, nearest
from loraplex.export.pairs import read_pairs
from loraplex.plots import save_picture
from loraplex.tuner.adapted_model import adapter_folder, load_adapted
from loraplex.tuner.adapter_folder import check_weights, read_config
from loraplex.tuner.model import LoraplexTuner

Part = Literal["A", "B"]
PARTS: tuple[Part, ...] = ("A", "B")


@dataclass(frozen=True)
class FactorVector:
    """One A or one B."""

    adapter: str
    site: str
    part: Part
    head: int | None
    """Which of several B over one A."""
    vector: Tensor
    """(r·in,) of A, (out·r,) of B with all scaling."""

    @property
    def label(self) -> str:
        """What it is colored by."""
        return self.adapter if self.head is None else f"{self.adapter}, head {self.head + 1}"

    @property
    def kind(self) -> str:
        """The kind of its site."""
        return kind_of(self.site)


@dataclass(frozen=True)
class Separation:
    """How far the A, or the B, of adapters lie apart."""

    part: Part
    vectors: int
    length: int
    labels: tuple[str, ...]
    similarity: float | None
    """Mean cosine at the same site; None where no site has two."""
    silhouette: float | None
    """Of the label; None with a single one."""


def read_vectors(adapters: Sequence[str], model: str | None, kinds: Sequence[str] = ()) -> list[FactorVector]:
    """Return every A and B of the adapters, of the kinds of module that are named, else of all.

    Raises:
        UserError: for an adapter that cannot be read, or a kind that none of its sites is of.
    """
    found: list[FactorVector] = []
    for adapter, name in zip(adapters, _names(adapters), strict=True):
        own = _read(adapter, name, model)
        known = {vector.kind for vector in own}
        for kind in kinds:
            if kind not in known:
                hint = nearest(kind, known) or f" It has {', '.join(sorted(known))}."
                raise UserError(f"'{adapter}' has no site of the kind '{kind}'.{hint}")
        found += [vector for vector in own if not kinds or vector.kind in kinds]
    return found


def check_lengths(vectors: Sequence[FactorVector]) -> bool:
    """Return whether all A and B are equally long, so that they go on one map; else all A are, and all B.

    Raises:
        UserError: when neither is the case: it names the lengths by kind of module.
    """
    lengths: dict[Part, set[int]] = {part: {len(v.vector) for v in vectors if v.part == part} for part in PARTS}
    if all(len(of_part) == 1 for of_part in lengths.values()):
        return lengths["A"] == lengths["B"]
    by_kind: dict[str, dict[Part, set[int]]] = {}
    for vector in vectors:
        by_kind.setdefault(vector.kind, {"A": set(), "B": set()})[vector.part].add(len(vector.vector))
    words = "; ".join(
        f"{kind} A {_numbers(sizes['A'])}, B {_numbers(sizes['B'])}" for kind, sizes in sorted(by_kind.items())
    )
    raise UserError(
        f"t-SNE compares vectors of one length, these have several ({words}): choose kinds of module with equal "
        "lengths by --module NAME, and adapters of equal rank"
    )


def separations(vectors: Sequence[FactorVector]) -> list[Separation]:
    """Return the two numbers for A and for B, in the original space."""
    return [_separation(part, [vector for vector in vectors if vector.part == part]) for part in PARTS]


def draw_vectors(path: Path, vectors: Sequence[FactorVector], title: str) -> None:
    """Draw the map: one point a tensor, colored by adapter or head, circles for A and triangles for B.

    Where A and B differ in length each gets a map of its own, with a shape for every adapter or head.

    Raises:
        UserError: for lengths that differ within A or B, or fewer than four tensors.
    """
    from loraplex.analysis.pictures import map_of, side_by_side, t_sne

    together = check_lengths(vectors)
    panels: dict[str, list[FactorVector]] = {"A and B": list(vectors)}
    if not together:
        panels = {part: [vector for vector in vectors if vector.part == part] for part in PARTS}
    if any(len(panel) < 4 for panel in panels.values()):
        fewest = min(map(len, panels.values()))
        raise UserError(f"a map of {fewest} tensors shows nothing: name more adapters, or more sites")
    maps = {}
    for name, panel in panels.items():
        shapes = {"tensor": [vector.part for vector in panel]} if together else None
        labels = [vector.label for vector in panel]
        maps[name] = map_of(t_sne(_stack(panel)), labels, name if together else f"{name} alone", shapes)
    save_picture(path, side_by_side(maps), title, "one point per tensor")


def _separation(part: Part, vectors: Sequence[FactorVector]) -> Separation:
    from sklearn.metrics import silhouette_score

    labels = tuple(dict.fromkeys(vector.label for vector in vectors))
    by_site: dict[str, list[Tensor]] = {}
    for vector in vectors:
        by_site.setdefault(vector.site, []).append(vector.vector)
    cosines = [
        float(torch.cosine_similarity(one, other, dim=0))
        for site in by_site.values()
        for one, other in itertools.combinations(site, 2)
        if len(one) == len(other)
    ]
    comparable = 1 < len(labels) < len(vectors)
    return Separation(
        part,
        len(vectors),
        len(vectors[0].vector) if vectors else 0,
        labels,
        sum(cosines) / len(cosines) if cosines else None,
        float(silhouette_score(_stack(vectors), [v.label for v in vectors])) if comparable else None,
    )


def _read(adapter: str, name: str, model: str | None) -> list[FactorVector]:
    folder = adapter_folder(adapter)
    config = read_config(folder)
    check_weights(folder)
    tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    found: list[FactorVector] = []
    if not any(f".{LoraplexTuner.prefix}" in key for key in tensors):
        factors = config.adapter.factors
        pairs = read_pairs(tensors, lambda site: float(factors.scale(config.alpha_of(site), config.rank_of(site))))
        for site, pair in pairs.items():
            found += _vectors(name, site, pair.a, [pair.b], several=False)
        return found
    loaded = load_adapted(adapter, model, "float32")
    assert isinstance(loaded.base_model, LoraplexTuner)
    for layer in loaded.base_model.site_layers():
        if loaded.active_adapter in layer.loraplex_adapters:
            a, heads, several = _matrices(layer.adapter(loaded.active_adapter).factors)
            found += _vectors(name, layer.site, a, heads, several)
    return found


def _matrices(factors: Factors) -> tuple[Tensor, list[Tensor], bool]:
    """Return A (r, in), each B (out, r), and whether these are heads."""
    a, b = factors.compact()
    # head after head, side by side
    return a, list(b.chunk(factors.heads, dim=1)), factors.heads > 1


def _vectors(name: str, site: str, a: Tensor, heads: Sequence[Tensor], several: bool) -> list[FactorVector]:
    """Return A and each B of a site as vectors."""
    flat = [tensor.detach().float().cpu().flatten() for tensor in (a, *heads)]
    return [
        FactorVector(name, site, "A", None, flat[0]),
        *(FactorVector(name, site, "B", i if several else None, b) for i, b in enumerate(flat[1:])),
    ]


def _names(adapters: Sequence[str]) -> list[str]:
    """Return the adapters' own names where these tell them apart, else what the user has written."""
    short = [Path(adapter).name for adapter in adapters]
    return short if len(set(short)) == len(short) else list(adapters)


def _stack(vectors: Sequence[FactorVector]) -> Any:
    return np.stack([vector.vector.numpy() for vector in vectors])


def _numbers(values: set[int]) -> str:
    return " or ".join(f"{value:,}" for value in sorted(values))
