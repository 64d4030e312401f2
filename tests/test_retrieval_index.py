"""The index: exact order, k beyond the corpus, what a damaged file says."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.retrieval.index import FILE, FlatIndex
from shared.files import ArtifactError


def unit_vectors(count: int, dim: int = 8, seed: int = 0) -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 200), st.integers(0, 30))
def test_a_search_gives_the_best_rows_in_order_and_never_more_than_there_are(rows: int, k: int, queries: int) -> None:
    stored, asked = unit_vectors(rows), unit_vectors(queries, seed=1)
    index = FlatIndex.empty(8)
    index.add(stored)
    found = index.search(asked, k)
    assert len(found) == queries
    for query, hits in zip(asked, found, strict=True):
        best = np.sort(stored @ query)[::-1][:k]
        np.testing.assert_allclose([score for score, _ in hits], best, atol=1e-5)
        assert len({row for _, row in hits}) == min(k, rows)
        np.testing.assert_allclose([stored[row] @ query for _, row in hits], best, atol=1e-5)


def test_a_read_index_answers_as_the_written_one(tmp_path: Path) -> None:
    index = FlatIndex.empty(8)
    index.add(unit_vectors(100))
    index.write(tmp_path)
    again = FlatIndex.read(tmp_path, threads=1)
    assert (len(again), again.dim) == (100, 8)
    assert again.search(unit_vectors(5, seed=2), 7) == index.search(unit_vectors(5, seed=2), 7)


def test_an_empty_index_finds_nothing() -> None:
    assert FlatIndex.empty(8).search(unit_vectors(2), 3) == [[], []]


@pytest.mark.parametrize("content", [b"", b"not an index", b"IxFI\x08\x00\x00\x00"])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match=FILE):
        FlatIndex.read(tmp_path)
