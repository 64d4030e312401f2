"""How the nearest vectors are told exactly, whatever names the candidates.

A finder (flat_index, faiss_index, card_index) names candidate rows with scores that may be a little off. The score
that is reported is made again from the stored float32 vectors: the inner product, summed in float64 and rounded to
float32, one row at a time, so that it has the same bits alone, in a batch and from every finder. Equal scores are
ordered by row.

Vectors have length 1 at most, as the encoder makes them: the bounds of what is certain rest on it.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]  # shape [n, dim]
Mask = NDArray[np.bool_]  # for every row of the index, whether it may be found
Masks = Sequence[Mask | None]  # one per query; None allows every row
Rows = list[tuple[float, int]]  # (score, row), best first


class Found(NamedTuple):
    """Candidates of n queries in any order; the score is −∞ where there is none."""

    scores: NDArray[np.float32]  # [n, c]
    rows: NDArray[np.int64]  # [n, c]


class Finder(Protocol):
    """What names candidates."""

    @property
    def slack(self) -> float | None:
        """The most that its scores are off, for a query of length 1; None when it may miss rows."""
        ...

    @property
    def few(self) -> int:
        """So many rows are sooner gathered and read than looked for among all."""
        ...

    @property
    def bytes_by_place(self) -> dict[str, int]:
        """Memory that a search reads."""
        ...

    def candidates(self, top_k: int) -> int:
        """How many candidates are asked for when so many rows are wanted."""
        ...

    def nearest(self, vectors: Vectors, count: int, masks: Masks) -> Found:
        """The best `count` rows by the finder's own scores, fewer when fewer are allowed."""
        ...


def inner_products(vectors: Vectors, query: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scores that are reported: [n, dim] and [dim] → [n], each from its own row alone."""
    # In float64 all products are exact, and the order of the sum no longer reaches the rounded result.
    products: NDArray[np.float64] = np.vecdot(vectors.astype(np.float64), query.astype(np.float64))
    return products.astype(np.float32)


def ranked(stored: Vectors, query: NDArray[np.float32], rows: NDArray[np.int64], top_k: int) -> Rows:
    """The best `top_k` of some rows, by their exact score and then by row."""
    scores = inner_products(stored[rows], query)
    best = np.lexsort((rows, -scores))[:top_k]
    return list(zip(scores[best].tolist(), rows[best].tolist(), strict=True))


def floors(scores: NDArray[np.float32], top_k: int, slacks: NDArray[np.float32]) -> NDArray[np.float32]:
    """What each query's candidates must score to be among its exact best `top_k`, [n, c] → [n].

    The exact score of the last one wanted is at least the top_k-th score less the slack, and a better one may have been
    told as much too low. −∞ when there are not so many candidates.
    """
    width = scores.shape[1]
    if width < top_k:
        return np.full(len(scores), -np.inf, dtype=np.float32)
    last: NDArray[np.float32] = np.partition(scores, width - top_k, axis=1)[:, width - top_k]
    return last - 2 * slacks


def by_mask(masks: Masks) -> list[tuple[Mask | None, NDArray[np.int64]]]:
    """The queries of each mask; masks are told apart by identity."""
    places: dict[int, list[int]] = {}
    for place, mask in enumerate(masks):
        places.setdefault(id(mask), []).append(place)
    return [(masks[same[0]], np.array(same, dtype=np.int64)) for same in places.values()]
