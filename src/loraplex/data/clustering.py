"""How many groups the prompts of a data set fall into: k-means, Ward's tree or DBSCAN, elbow and silhouette.

HydraLoRA (arXiv 2404.19245, section 3.2) takes the number N of its heads from k-means over TF-IDF features of the
corpus, before training, and uses the groups for nothing else: rows are not assigned to heads. The paper leaves the rest
open and publishes no code for it; what is chosen here, and why, is in docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from loraplex.data.texts import MOST_TEXTS, Array, TextPoints, text_points
from loraplex.errors import UserError, nearest

Method = Literal["kmeans", "ward", "dbscan"]
LEAST, MOST = 2, 10
# Ward's tree holds all distances: 4,000 rows are 64 MB of them.
MOST_IN_TREE = 4_000
RESTARTS = 10
# Rows whose silhouettes are averaged.
SILHOUETTE_ROWS = 3_000
# How far the inertia has to dip below a straight line, as a share of its whole fall, for a bend to be called an elbow.
CLEAR_ELBOW = 0.15
# Silhouettes that differ by less are the same.
SAME_SILHOUETTE = 0.005
# A silhouette below this shows "no substantial structure" (Kaufman and Rousseeuw, Finding Groups in Data, 1990).
STRUCTURE = 0.25
# What the paper finds best on general instructions, 3 to 4, for data that say nothing clear.
WITHOUT_EVIDENCE = 4

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Partition:
    """One number of groups, and how well it fits."""

    groups: int
    inertia: float
    """Σ ‖x − centre of its group‖²."""
    silhouette: float
    """Mean of (b − a) / max(a, b): a the mean distance to the own group, b to the nearest other."""


@dataclass(frozen=True)
class Group:
    """One of the groups that were chosen."""

    size: int
    words: tuple[str, ...]
    """Those whose weight is furthest above the average of all texts."""


@dataclass(frozen=True)
class Grouping:
    """The number of groups that is suggested, the evidence, and the groups."""

    method: Method
    number: int
    """The suggestion."""
    reason: str
    """Why, in one sentence."""
    partitions: tuple[Partition, ...]
    """What was tried; inertia and silhouette of each."""
    elbow: int | None
    """Where the inertia stops falling fast; None where it does so nowhere."""
    best_silhouette: int | None
    groups: tuple[Group, ...]
    labels: Labels
    """(n,) the group of every row that was looked at, -1 for noise (DBSCAN)."""
    points: TextPoints

    def group_of(self, texts: Sequence[str]) -> Labels:
        """Return the group (texts,) whose centre is nearest to each; the largest, 0, for a text without known words."""
        centres = np.stack([self.points.points[self.labels == label].mean(axis=0) for label in range(len(self.groups))])
        places = self.points.place(texts)
        distances = ((places[:, None] - centres) ** 2).sum(axis=-1)
        return np.where(places.any(axis=1), distances.argmin(axis=1), 0)

    def evidence(self) -> dict[str, Any]:
        """Return all but rows and points as plain values."""
        return {
            "number": self.number,
            "reason": self.reason,
            "method": self.method,
            "texts": len(self.points),
            "elbow": self.elbow,
            "best_silhouette": self.best_silhouette,
            "partitions": [vars(partition) for partition in self.partitions],
            "groups": [{"size": group.size, "words": list(group.words)} for group in self.groups],
            "noise": int((self.labels < 0).sum()),
        }


def group_texts(
    texts: Sequence[str], method: Method = "kmeans", *, least: int = LEAST, most: int = MOST, seed: int = 0
) -> Grouping:
    """Return how many groups from `least` to `most` the texts fall into; the same for the same seed.

    Raises:
        UserError: for a range that makes no sense, an unknown method, or fewer different texts than groups.
    """
    if method not in get_args(Method):
        raise UserError(f"method '{method}' is unknown: kmeans, ward or dbscan.{nearest(method, get_args(Method))}")
    if not 2 <= least <= most:
        raise UserError(f"the numbers to try, {least} to {most}, make no sense: the least is 2, the most not below it")
    different = len({text.strip() for text in texts} - {""})
    if different <= most:
        raise UserError(
            f"{different} different texts among {len(texts)} are too few to tell {most} groups apart: "
            "give more rows or try fewer groups"
        )
    points = text_points(texts, most_texts=MOST_IN_TREE if method == "ward" else MOST_TEXTS, seed=seed)
    different = len(np.unique(points.points.round(6), axis=0))
    if different <= most:
        raise UserError(
            f"the {len(texts)} texts come down to {different} different sets of words, too few to tell {most} groups "
            "apart: give more rows or try fewer groups"
        )
    if method == "dbscan":
        return _by_density(points, least, most, seed)
    found = _kmeans(points.points, least, most, seed) if method == "kmeans" else _ward(points.points, least, most)
    partitions = tuple(
        Partition(number, inertia(points.points, labels), silhouette(points.points, labels, seed))
        for number, labels in found.items()
    )
    # One group: what the others are compared with, no candidate itself.
    whole = inertia(points.points, np.zeros(len(points), dtype=np.int64))
    bend = elbow([1, *found], [whole, *(partition.inertia for partition in partitions)])
    bend = bend if bend is None else max(bend, least)
    best = _best(partitions)
    number, reason = _decide(bend, best, partitions)
    labels = found[number]
    return Grouping(
        method, number, reason, partitions, bend, best.groups, describe_groups(points, labels), labels, points
    )


def elbow(numbers: Sequence[int], values: Sequence[float]) -> int | None:
    """Return the number whose value lies furthest below the straight line from the first to the last point.

    Both axes are scaled to [0, 1] (Satopää et al., Finding a "kneedle" in a haystack, 2011); None where no point lies
    more than `CLEAR_ELBOW` below the line.
    """
    x, y = np.asarray(numbers, dtype=float), np.asarray(values, dtype=float)
    if len(x) < 3 or y[0] <= y[-1]:
        return None
    below = 1 - (x - x[0]) / (x[-1] - x[0]) - (y - y[-1]) / (y[0] - y[-1])
    place = int(below.argmax())
    return int(x[place]) if below[place] > CLEAR_ELBOW else None


def inertia(points: Array, labels: Labels) -> float:
    """Return Σ ‖x − centre of its group‖² of points (n, d) and labels (n,)."""
    return float(sum(((group - group.mean(axis=0)) ** 2).sum() for group in _groups_of(points, labels)))


def silhouette(points: Array, labels: Labels, seed: int) -> float:
    """Return the mean silhouette of at most `SILHOUETTE_ROWS` points (n, d); 0 where they are all of one group."""
    from sklearn.metrics import silhouette_score

    if len(points) > SILHOUETTE_ROWS:
        rows = np.random.default_rng(seed).choice(len(points), SILHOUETTE_ROWS, replace=False)
        points, labels = points[rows], labels[rows]
    if not 1 < len(np.unique(labels)) < len(labels):
        return 0.0
    return float(silhouette_score(points, labels))


def describe_groups(points: TextPoints, labels: Labels, words: int = 6) -> tuple[Group, ...]:
    """Return size and typical words of every group, in the order of their labels."""
    everywhere = np.asarray(points.weights.mean(axis=0)).ravel()
    groups = []
    for label in range(int(labels.max(initial=-1)) + 1):
        here = labels == label
        above = np.asarray(points.weights[here].mean(axis=0)).ravel() - everywhere
        best = np.argsort(-above, kind="stable")[:words]
        groups.append(Group(int(here.sum()), tuple(str(points.words[i]) for i in best if above[i] > 0)))
    return tuple(groups)


def tree(points: Array) -> Array:
    """Return Ward's tree of points (n, d) as scipy's linkage matrix (n − 1, 4)."""
    from scipy.cluster.hierarchy import linkage  # type: ignore[import-untyped]

    merges: Array = linkage(points, "ward")
    return merges


def _kmeans(points: Array, least: int, most: int, seed: int) -> dict[int, Labels]:
    from sklearn.cluster import KMeans

    tried = (KMeans(number, n_init=RESTARTS, random_state=seed).fit(points) for number in range(least, most + 1))
    return {len(np.unique(found.labels_)): _by_size(found.labels_) for found in tried}


def _ward(points: Array, least: int, most: int) -> dict[int, Labels]:
    from scipy.cluster.hierarchy import fcluster

    merges = tree(points)
    # equal heights can leave fewer groups than were asked for
    tried = [fcluster(merges, number, "maxclust") for number in range(least, most + 1)]
    return {len(np.unique(labels)): _by_size(labels) for labels in tried if len(np.unique(labels)) > 1}


def _by_density(points: TextPoints, least: int, most: int, seed: int) -> Grouping:
    """Group by density; the radius is the elbow of the distances to the neighbour that makes a row a core point."""
    from sklearn.cluster import DBSCAN
    from sklearn.neighbors import NearestNeighbors

    neighbours = max(5, len(points) // 100)
    distances = NearestNeighbors(n_neighbors=neighbours).fit(points.points).kneighbors()[0][:, -1]
    descending = np.sort(distances)[::-1]
    radius = float(np.median(distances))
    if (bend := elbow(range(len(descending)), descending.tolist())) is not None:
        radius = float(descending[bend])
    raw = DBSCAN(eps=radius, min_samples=neighbours).fit(points.points).labels_
    labels = np.where(raw < 0, -1, _by_size(raw, ignore=-1))
    number = int(labels.max(initial=-1)) + 1
    inside = labels >= 0
    partition = Partition(
        number,
        inertia(points.points[inside], labels[inside]),
        silhouette(points.points[inside], labels[inside], seed),
    )
    groups_in_words = "1 dense group" if number == 1 else f"{number} dense groups"
    words = f"DBSCAN finds {groups_in_words} at a radius of {radius:.2f} and {1 - inside.mean():.0%} noise"
    suggested = min(max(number, least), most)
    if suggested != number:
        words += f"; {suggested} is the nearest number from {least} to {most}"
    groups = describe_groups(points, labels)
    return Grouping("dbscan", suggested, words, (partition,), None, None, groups, labels, points)


def _best(partitions: Sequence[Partition]) -> Partition:
    """Return the smallest number whose silhouette is as good as the best."""
    top = max(partition.silhouette for partition in partitions)
    return next(partition for partition in partitions if partition.silhouette >= top - SAME_SILHOUETTE)


def _decide(bend: int | None, best: Partition, partitions: Sequence[Partition]) -> tuple[int, str]:
    """Return the suggestion and why."""
    numbers = [partition.groups for partition in partitions]
    rising = best.groups == numbers[-1]
    if bend == best.groups and not rising:
        return bend, f"elbow and silhouette agree on {bend}"
    if best.silhouette >= STRUCTURE:
        if rising:
            return best.groups, f"the silhouette still rises at {best.groups}, the most that was tried (see --most)"
        other = "no clear elbow" if bend is None else f"the elbow is at {bend}"
        return best.groups, f"the silhouette is highest at {best.groups} ({other})"
    weak = f"no silhouette reaches {STRUCTURE}, so there are no groups to speak of"
    if bend is not None:
        return bend, f"the elbow is at {bend}; {weak}"
    number = min(max(WITHOUT_EVIDENCE, numbers[0]), numbers[-1])
    return number, f"no clear elbow, and {weak}: {number}, as in the paper on general instructions"


def _groups_of(points: Array, labels: Labels) -> list[Array]:
    return [points[labels == label] for label in np.unique(labels)]


def _by_size(labels: npt.NDArray[Any], ignore: int | None = None) -> Labels:
    """Return the labels counted 0, 1, … from the largest group; equal ones in the order of their first row."""
    found, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    order = sorted((-size, start, label) for label, start, size in zip(found, first, sizes, strict=True))
    place = {label: rank for rank, (_, _, label) in enumerate(entry for entry in order if entry[2] != ignore)}
    return np.asarray([place.get(label, -1) for label in labels], dtype=np.int64)
