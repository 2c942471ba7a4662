"""Texts as points: TF-IDF, then latent semantic analysis (a truncated SVD), rows scaled to length 1."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loraplex.errors import UserError
from loraplex.extras import require

# Words and directions that are kept. The paper names neither; these are usual sizes for instructions.
MOST_WORDS = 10_000
DIRECTIONS = 100
# More texts than this are sampled: the number of groups does not need more, and every method stays under a minute.
MOST_TEXTS = 10_000

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TextPoints:
    """The texts that were looked at, as points whose directions say what they are about."""

    rows: npt.NDArray[np.int64]
    """(n,) indices of the texts, ascending; all of them unless there are too many."""
    points: Array
    """(n, d), each row of length 1."""
    weights: Any
    """(n, words) TF-IDF, a sparse matrix."""
    words: npt.NDArray[Any]
    """(words,) what its columns stand for."""
    wordless: int
    """Texts that were left out because they have no such word."""
    vectorizer: Any
    """What has weighed the words, fitted."""
    directions: Any
    """What has reduced their number, fitted."""

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, texts: Sequence[str]) -> Array:
        """Return other texts as points (texts, d) of the same space; one without a known word is 0 everywhere."""
        from sklearn.preprocessing import normalize

        points: Array = normalize(self.directions.transform(self.vectorizer.transform(texts)))
        return points


def text_points(texts: Sequence[str], *, most_texts: int = MOST_TEXTS, seed: int = 0) -> TextPoints:
    """Return `texts` as points; texts without a known word are left out.

    The weight of a word in a text is count · (ln((1 + n) / (1 + texts with it)) + 1), rows scaled to length 1, over the
    `MOST_WORDS` most frequent words, English stop words left out, and words that stand in every text too: those belong
    to the prompt's template. The points are the first `DIRECTIONS` coordinates of its SVD, scaled to length 1 again.

    Raises:
        UserError: when fewer than three texts, or fewer than three different words, are left, or scikit-learn is not
            installed.
    """
    require("to group prompts by their words", "analysis", only="scikit-learn")
    chosen = list(range(len(texts)))
    if len(texts) > most_texts:
        chosen = sorted(random.Random(seed).sample(chosen, most_texts))
    rows, weights, vectorizer = _weights(np.asarray(chosen, dtype=np.int64), [texts[index] for index in chosen])
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    size = min(DIRECTIONS, weights.shape[1] - 1, weights.shape[0] - 1)
    # randomized, seeded; the sparse matrix is never made dense
    directions = TruncatedSVD(size, random_state=seed)
    points = normalize(directions.fit_transform(weights))
    words = vectorizer.get_feature_names_out()
    return TextPoints(rows, points, weights, words, len(chosen) - len(rows), vectorizer, directions)


def _weights(rows: npt.NDArray[np.int64], texts: list[str]) -> tuple[npt.NDArray[np.int64], Any, Any]:
    """Return the rows that have words, their TF-IDF weights, and what has weighed them."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if len(texts) < 3:
        raise UserError(f"{len(texts)} texts are too few to look for groups: give at least three")
    different = len(set(texts))
    if different < 3:
        raise UserError(f"the {len(texts)} texts are only {different} different ones: nothing to look for groups in")
    # as a count: a word of all texts but one stays
    vectorizer = TfidfVectorizer(max_features=MOST_WORDS, stop_words="english", max_df=len(texts) - 1)
    try:
        weights = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise UserError(
            f"the {len(texts)} texts have no words but stop words and those that all of them share: "
            "choose the text with --prompt '{field}'"
        ) from error
    kept = np.flatnonzero(weights.getnnz(axis=1))
    if len(kept) < 3 or weights.shape[1] < 3:
        raise UserError(
            f"{len(kept)} of {len(texts)} texts and {weights.shape[1]} words are left without stop words: too few to "
            "look for groups; choose the text with --prompt '{field}'"
        )
    return rows[kept], weights[kept], vectorizer
