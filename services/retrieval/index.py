"""The vectors of an index and what searches them: the best rows of each query, exactly scored.

Row i is row i of the corpus. With a finder that reads every vector the result is exact: when its scores cannot tell
the last row wanted from those left out, more candidates are asked for. With one that may miss rows, what it names is
scored exactly. A filter never takes rows from a result: where it leaves few rows, those are read one by one; where the
finder names fewer than there are, too.
Not thread-safe.
"""

import numpy as np
from numpy.typing import NDArray

from services.retrieval.flat_index import FlatIndex
from services.retrieval.nearest import Finder, Masks, Rows, Vectors, by_mask, floors, ranked

SCAN_ROWS = 65_536  # rows gathered at once
WIDEN = 4  # times as many candidates at each further try


class VectorIndex:
    """Stored vectors, shape [rows, dim] in float32, and a finder of them."""

    def __init__(self, stored: Vectors, finder: Finder) -> None:
        self._stored = stored
        self.finder = finder

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self._stored.shape[1])

    @property
    def bytes_by_place(self) -> dict[str, int]:
        """Memory that a search reads, by place: the CPU or a card."""
        return self.finder.bytes_by_place

    def vectors(self, rows: NDArray[np.int64]) -> Vectors:
        """The stored vectors of some rows, shape [n, dim]."""
        return np.asarray(self._stored[rows])

    def search(self, vectors: Vectors, top_k: int, rows_allowed: Masks | None = None) -> list[Rows]:
        """The best rows of each vector, best first, equal scores by row: `top_k`, or all that are allowed.

        `rows_allowed` has a mask over all rows, or None, for each vector.
        """
        masks: Masks = [None] * len(vectors) if rows_allowed is None else rows_allowed
        results: list[Rows] = [[] for _ in masks]
        wanted = min(top_k, len(self))
        if not wanted:
            return results
        broad: list[int] = []
        for mask, places in by_mask(masks):
            if mask is not None and np.count_nonzero(mask) <= self.finder.few:
                found = scan(self._stored, np.flatnonzero(mask), vectors[places], wanted)
                for place, rows in zip(places, found, strict=True):
                    results[place] = rows
            else:
                broad.extend(places)
        if broad:
            find = self._named if self.finder.slack is None else self._exact
            found = find(np.ascontiguousarray(vectors[broad]), wanted, [masks[place] for place in broad])
            for place, rows in zip(broad, found, strict=True):
                results[place] = rows
        return results

    def _exact(self, vectors: Vectors, top_k: int, masks: Masks) -> list[Rows]:
        """With a finder whose scores are off by its slack at most: more candidates until the best are certain."""
        results: list[Rows] = [[] for _ in masks]
        slacks = np.linalg.norm(vectors, axis=1) * self.finder.slack
        waiting = np.arange(len(vectors), dtype=np.int64)
        count = self.finder.candidates(top_k)
        while len(waiting):
            count = min(count, len(self))
            found = self.finder.nearest(vectors[waiting], count, [masks[int(place)] for place in waiting])
            floor = floors(found.scores, top_k, slacks[waiting])
            lowest = found.scores.min(axis=1)
            # All that were left out score no better than the lowest that was named.
            told: NDArray[np.bool_] = (lowest < floor) | (lowest == -np.inf) | (count == len(self))
            for place in np.flatnonzero(told):
                rows = found.rows[place, (found.scores[place] >= floor[place]) & (found.scores[place] > -np.inf)]
                results[int(waiting[place])] = ranked(self._stored, vectors[waiting[place]], rows, top_k)
            waiting = waiting[~told]
            count *= WIDEN
        return results

    def _named(self, vectors: Vectors, top_k: int, masks: Masks) -> list[Rows]:
        """With a finder that may miss rows: what it names, or every row allowed when it names too few."""
        count = min(self.finder.candidates(top_k), len(self))
        found = self.finder.nearest(vectors, count, masks)
        results: list[Rows] = []
        for query, mask, scores, rows in zip(vectors, masks, *found, strict=True):
            named = rows[scores > -np.inf]
            allowed = len(self) if mask is None else np.count_nonzero(mask)
            if len(named) >= min(top_k, allowed):
                results.append(ranked(self._stored, query, named, top_k))
            else:
                every = np.arange(len(self)) if mask is None else np.flatnonzero(mask)
                results += scan(self._stored, every, query[None], top_k)
        return results


def scan(stored: Vectors, rows: NDArray[np.int64], vectors: Vectors, top_k: int) -> list[Rows]:
    """The best `top_k` of just these rows for each vector, exactly."""
    results: list[Rows] = [[] for _ in vectors]
    for start in range(0, len(rows), SCAN_ROWS):
        some = rows[start : start + SCAN_ROWS]
        gathered = np.asarray(stored[some])
        for place, hits in enumerate(VectorIndex(gathered, FlatIndex(gathered)).search(vectors, top_k)):
            both = [*results[place], *((score, int(some[row])) for score, row in hits)]
            results[place] = sorted(both, key=lambda hit: (-hit[0], hit[1]))[:top_k]
    return results
