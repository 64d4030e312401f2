"""All vectors in float32, as they lie in the file, by matrix products on a CPU: numpy alone, nothing else is loaded.

Blocks of rows are multiplied by threads of our own while BLAS keeps to one thread each. Threads of BLAS wait by
spinning: they take 19 of the 30 ms after a search from the encoder, and a search on a busy machine takes ten times as
long.
The best are found by maxima of groups: the c groups with the largest maxima hold the c best scores, so only those are
looked into. Not thread-safe.

The best 10 of 28,936 vectors of length 384 take 15 ms of processor time for 64 queries, 1.9 ms for one; in FAISS's flat
index 115 and 5.4.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from services.retrieval.nearest import Found, Mask, Masks, Vectors, by_mask

GROUP = 32  # rows that share a maximum
BLOCK = 4096  # rows multiplied at once: their scores for 64 queries stay in the processor's cache
SCORE_BYTES = 64 << 20  # scores kept at once: 64 queries against 262,144 rows
SPARE = 16  # candidates beyond those wanted, so that the last one is told apart at the first try
FEW, FEW_SHARE = 1024, 16  # gathering a row takes some ten times as long as passing it by


class Scores(NamedTuple):
    """Scores of m rows, in whole blocks of whole groups, by n queries: row-major [m, n], with maxima [m / GROUP, n].

    Group g of a block has the block's rows g, g + lanes, g + 2·lanes … with lanes = block / GROUP, because maxima over
    long runs of memory are the fastest.
    """

    scores: NDArray[np.float32]
    maxima: NDArray[np.float32]
    block: int


class FlatIndex:
    """A finder that reads every vector."""

    def __init__(self, stored: Vectors, *, threads: int = 1, score_bytes: int = SCORE_BYTES) -> None:
        self._stored = stored
        self._score_bytes = score_bytes
        self._pool = ThreadPoolExecutor(threads, "vectors") if threads > 1 else None
        self.slack = stored.shape[1] * 2.0**-23  # twice the bound of a sum of so many float32 products
        self.few = max(FEW, len(stored) // FEW_SHARE)

    @property
    def bytes_by_place(self) -> dict[str, int]:
        """Memory that a search reads: all vectors, on the CPU."""
        return {"cpu": self._stored.nbytes}

    def candidates(self, top_k: int) -> int:
        """A few more than wanted."""
        return top_k + SPARE

    def nearest(self, vectors: Vectors, count: int, masks: Masks) -> Found:
        """The best rows by float32 scores, which depend on the batch in their last bits."""
        step = max(1, self._score_bytes // (4 * BLOCK * len(vectors))) * BLOCK
        groups = [(mask, places) for mask, places in by_mask(masks) if mask is not None]
        parts = []
        with _blas().limit(limits=1):
            for start in range(0, len(self._stored), step):
                some = [(mask[start : start + step], places) for mask, places in groups]
                scores = self._scores(self._stored[start : start + step], vectors, some)
                part = best(scores, count)
                parts.append(Found(part.scores, part.rows + start))
        return merged(parts, count)

    def _scores(self, stored: Vectors, vectors: Vectors, masks: list[tuple[Mask, NDArray[np.int64]]]) -> Scores:
        block = min(BLOCK, -(-len(stored) // GROUP) * GROUP)
        height = -(-len(stored) // block) * block
        scores = np.empty((height, len(vectors)), dtype=np.float32)
        maxima = np.empty((height // GROUP, len(vectors)), dtype=np.float32)
        filled = Scores(scores, maxima, block)
        # [m, dim] × [dim, n] is faster than its transpose, above all for few queries.
        work = partial(fill, filled, stored, np.ascontiguousarray(vectors.T), masks)
        starts = range(0, height, block)
        for _ in self._pool.map(work, starts) if self._pool and len(starts) > 1 else map(work, starts):
            pass
        return filled


def fill(
    filled: Scores, stored: Vectors, queries: Vectors, masks: list[tuple[Mask, NDArray[np.int64]]], start: int
) -> None:
    """Scores and maxima of the block that begins at `start`; −∞ for rows that are not allowed or not there."""
    rows = stored[start : start + filled.block]
    scores = filled.scores[start : start + filled.block]
    np.matmul(rows, queries, out=scores[: len(rows)])
    scores[len(rows) :] = -np.inf
    for mask, places in masks:
        scores[np.ix_(np.flatnonzero(~mask[start : start + filled.block]), places)] = -np.inf
    lanes = filled.block // GROUP
    maxima = filled.maxima[start // GROUP : start // GROUP + lanes]
    np.max(scores.reshape(GROUP, lanes, -1), axis=0, out=maxima)


def best(filled: Scores, count: int) -> Found:
    """The largest `count` scores of each query and their rows, unordered; fewer when there are fewer rows."""
    maxima = np.ascontiguousarray(filled.maxima.T)
    groups = largest(maxima, count)
    lanes = filled.block // GROUP
    first = groups // lanes * filled.block + groups % lanes
    rows = (first[:, :, None] + np.arange(GROUP) * lanes).reshape(len(maxima), -1)
    return cut(Found(filled.scores[rows, np.arange(len(maxima))[:, None]], rows), count)


def merged(parts: list[Found], count: int) -> Found:
    """The best of several parts."""
    if len(parts) == 1:
        return parts[0]
    scores = np.concatenate([part.scores for part in parts], axis=1)
    return cut(Found(scores, np.concatenate([part.rows for part in parts], axis=1)), count)


def cut(found: Found, count: int) -> Found:
    """The best `count` candidates of each query."""
    places = largest(found.scores, count)
    return Found(np.take_along_axis(found.scores, places, axis=1), np.take_along_axis(found.rows, places, axis=1))


def largest(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Columns of the largest `count` scores of each row, unordered; all when there are fewer."""
    width = scores.shape[1]
    if count >= width:
        return np.broadcast_to(np.arange(width), scores.shape)
    return np.argpartition(scores, width - count, axis=1)[:, width - count :]


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")
