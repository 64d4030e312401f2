"""Exact search: the best rows whatever the batch, ties, masks, k beyond the index; what a damaged file says."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_world import Mask, Vectors, clustered, surely, tied_vectors, unit, unit_vectors

from services.retrieval import vector_file
from services.retrieval.flat_index import BLOCK, FlatIndex
from services.retrieval.index import SCAN_ROWS, VectorIndex, scan
from shared.files import ArtifactError

DIM = 5


def exact(stored: Vectors, *, threads: int = 1, score_bytes: int = 1 << 26) -> VectorIndex:
    return VectorIndex(stored, FlatIndex(stored, threads=threads, score_bytes=score_bytes))


def masks_for(count: int, rows: int, seed: int) -> list[Mask | None]:
    """None, a mask of few rows and one of many, in turn; each is given to several queries."""
    generator = np.random.default_rng(seed)
    some = [None, *(generator.random(rows) < share for share in (0.0, 0.1, 0.9))]
    return [some[number % len(some)] for number in range(count)]


@settings(deadline=None, max_examples=80)
@given(
    stored=tied_vectors(st.integers(0, 200), DIM),
    queries=tied_vectors(st.integers(0, 9), DIM),
    top_k=st.integers(0, 250),
    threads=st.integers(1, 2),
)
def test_a_search_gives_the_best_rows_of_exact_scores_and_ties_by_row(
    stored: Vectors, queries: Vectors, top_k: int, threads: int
) -> None:
    found = exact(stored, threads=threads).search(queries, top_k)
    assert found == [surely(stored, query, top_k) for query in queries]


@settings(deadline=None, max_examples=40)
@given(
    stored=tied_vectors(st.integers(1, 120), DIM),
    queries=tied_vectors(st.integers(1, 9), DIM),
    top_k=st.integers(1, 130),
    seed=st.integers(0, 99),
)
def test_a_mask_leaves_the_best_of_the_rows_that_it_allows(
    stored: Vectors, queries: Vectors, top_k: int, seed: int
) -> None:
    masks = masks_for(len(queries), len(stored), seed)
    finder = FlatIndex(stored)
    expected = [surely(stored, query, top_k, mask) for query, mask in zip(queries, masks, strict=True)]
    assert VectorIndex(stored, finder).search(queries, top_k, masks) == expected
    finder.few = 0  # so few rows are gathered and read alone; looked for among all, they must be the same
    assert VectorIndex(stored, finder).search(queries, top_k, masks) == expected


def test_several_blocks_parts_and_threads_give_the_same_rows() -> None:
    stored = clustered(3 * BLOCK + 7, dim=16)
    queries = np.concatenate([stored[:3], unit_vectors(3, 16, seed=1)])
    masks = masks_for(len(queries), len(stored), 0)
    expected = [surely(stored, query, 40, mask) for query, mask in zip(queries, masks, strict=True)]
    for threads in (1, 3):
        for score_bytes in (1, 1 << 26):  # a part for each block, or all at once
            assert exact(stored, threads=threads, score_bytes=score_bytes).search(queries, 40, masks) == expected


def test_rows_that_differ_in_the_last_bits_are_told_apart() -> None:
    generator = np.random.default_rng(0)
    stored = unit(unit_vectors(1, 32) + 1e-7 * generator.normal(size=(600, 32)))
    for top_k in (1, 10, 599):
        assert exact(stored).search(stored[:2], top_k) == [surely(stored, query, top_k) for query in stored[:2]]


def test_more_equal_rows_than_candidates_come_by_row() -> None:
    stored = np.concatenate([unit_vectors(300), np.repeat(unit_vectors(1, seed=5), 5000, axis=0)])
    (hits,) = exact(stored).search(stored[-1:], 7)
    assert [row for _, row in hits] == list(range(300, 307))


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_a_query_finds_the_same_bits_alone_and_in_any_batch(size: int) -> None:
    stored, queries = clustered(5000), clustered(64, seed=9)
    index = exact(stored, threads=2)
    alone = [index.search(query[None], 20)[0] for query in queries]
    in_batches = [hits for start in range(0, 64, size) for hits in index.search(queries[start : start + size], 20)]
    assert in_batches == alone


def test_an_empty_index_finds_nothing() -> None:
    assert exact(unit_vectors(0)).search(unit_vectors(2), 3) == [[], []]


def test_rows_read_one_by_one_are_ordered_over_all_parts() -> None:
    stored = np.repeat(unit_vectors(5, 2), SCAN_ROWS // 2, axis=0)
    rows = np.arange(1, len(stored), dtype=np.int64)
    (hits,) = scan(stored, rows, stored[:1], 3)
    assert [row for _, row in hits] == [1, 2, 3]


def test_a_written_file_is_read_as_it_was_and_its_rows_can_be_asked_for(tmp_path: Path) -> None:
    stored = unit_vectors(100)
    vector_file.write(tmp_path, [stored[:60], stored[60:]], rows=100, dim=8)
    index = exact(vector_file.read(tmp_path))
    assert (len(index), index.dim, index.bytes_by_place) == (100, 8, {"cpu": stored.nbytes})
    np.testing.assert_array_equal(index.vectors(np.array([99, 0, 0])), stored[[99, 0, 0]])


def test_an_empty_file_is_an_empty_index(tmp_path: Path) -> None:
    vector_file.write(tmp_path, [], rows=0, dim=8)
    assert vector_file.read(tmp_path).shape == (0, 8)


def test_a_file_of_too_few_vectors_is_not_written_silently(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 5 vectors"):
        vector_file.write(tmp_path, [unit_vectors(3)], rows=5, dim=8)


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "gone":
        path.unlink()
    elif kind == "other numbers":
        np.save(path, np.zeros((3, 8)))
    else:
        cuts = {"empty": 0, "half a header": 50, "no rows": 128, "cut off": len(content) - 1}
        path.write_bytes(b"not vectors" if kind == "nonsense" else content[: cuts[kind]])


@pytest.mark.parametrize("kind", ["gone", "empty", "half a header", "no rows", "cut off", "nonsense", "other numbers"])
def test_a_damaged_file_is_named_with_its_remedy(kind: str, tmp_path: Path) -> None:
    vector_file.write(tmp_path, [unit_vectors(9)], rows=9, dim=8)
    damage(tmp_path / vector_file.FILE, kind)
    with pytest.raises(ArtifactError, match=r"vectors\.npy.* make it again"):
        vector_file.read(tmp_path)
