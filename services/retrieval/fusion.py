"""Two rankings of one query made one: a sum of relative scores, or of reciprocal ranks.

In: the candidates of both searches as arrays, each row once, scored by both. Out: one score per candidate, and the
order of the best; equal scores are in the order of rows. Pure functions, no I/O.
"""

import numpy as np
from numpy.typing import NDArray

RANK_OFFSET = 60  # k of reciprocal ranks, as Cormack et al. (2009) have it
NOTHING = 1e-12  # a best score that is no more than rounding

Numbers = NDArray[np.floating]
Rows = NDArray[np.int64]


def relative_sum(dense: Numbers, words: Numbers, *, dense_share: float) -> NDArray[np.float64]:
    """dense_share · dense / best dense + (1 − dense_share) · words / best words of each candidate; at most 1.

    A search whose best score is not above 0 has found nothing and adds nothing.
    """
    return dense_share * _relative(dense) + (1 - dense_share) * _relative(words)


def reciprocal_ranks(candidates: Rows, dense: Rows, words: Rows, *, dense_share: float) -> NDArray[np.float64]:
    """dense_share / (k + rank in dense) + (1 − dense_share) / (k + rank in words) of each candidate, k = 60.

    `dense` and `words` are the rows that each search found, best first (rank 1); a row that it did not find gets
    nothing from it. `candidates` are sorted and hold all of both.
    """
    scores = np.zeros(len(candidates))
    for ranking, share in ((dense, dense_share), (words, 1 - dense_share)):
        scores[np.searchsorted(candidates, ranking)] += share / (RANK_OFFSET + 1 + np.arange(len(ranking)))
    return scores


def best_first(scores: Numbers, rows: Rows, top_k: int) -> NDArray[np.intp]:
    """Places of the best min(top_k, n) scores, best first; equal ones in the order of rows."""
    return np.lexsort((rows, -scores))[:top_k]


def _relative(scores: Numbers) -> NDArray[np.float64]:
    best = float(scores.max(initial=0.0))
    return scores.astype(np.float64) / best if best > NOTHING else np.zeros(len(scores))
