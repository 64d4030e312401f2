"""What the tests of vector indexes share: vectors of several sorts, and the slow sure way to search them."""

import math
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Mask = NDArray[np.bool_]
Rows = list[tuple[float, int]]


def unit(vectors: NDArray[np.float64]) -> Vectors:
    """The same directions with length 1; zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Vectors = (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)
    return scaled


def unit_vectors(count: int, dim: int = 8, seed: int = 0) -> Vectors:
    """Random vectors of length 1."""
    return unit(np.random.default_rng(seed).normal(size=(count, dim)))


def clustered(count: int, dim: int = 64, seed: int = 0) -> Vectors:
    """Vectors of length 1 around a centre for each 20 of them."""
    generator = np.random.default_rng(seed)
    centres = unit(generator.normal(size=(max(1, count // 20), dim)))
    return unit(centres[generator.integers(0, len(centres), count)] + generator.normal(size=(count, dim)) / dim**0.5)


@st.composite
def tied_vectors(draw: st.DrawFn, rows: st.SearchStrategy[int], dim: int) -> Vectors:
    """Vectors of length 1 (or 0) with few different numbers, so that many are equal and many scores are."""
    seed, steps = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 3))
    drawn = np.random.default_rng(seed).integers(-steps, steps + 1, size=(draw(rows), dim))
    return unit(drawn.astype(np.float64))


def surely(stored: Vectors, query: Vectors, top_k: int, allowed: Mask | None = None) -> Rows:
    """The best rows by exactly summed products, rounded once; equal scores by row."""
    rows = range(len(stored)) if allowed is None else np.flatnonzero(allowed).tolist()
    products = stored.astype(np.float64) * query.astype(np.float64)
    scores = [(float(np.float32(math.fsum(products[row]))), row) for row in rows]
    return sorted(scores, key=lambda pair: (-pair[0], pair[1]))[:top_k]


def found_share(found: Sequence[Rows], best: Sequence[Rows]) -> float:
    """Recall: how many of the best rows were found."""
    shares = [len({row for _, row in a} & {row for _, row in b}) / len(b) for a, b in zip(found, best, strict=True)]
    return float(np.mean(shares))
