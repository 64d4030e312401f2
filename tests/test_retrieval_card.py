"""Search as it runs on GPUs: on one where there is one, else on the device "cpu" with the same roundings; placement."""

from pathlib import Path

import numpy as np
import pytest
import structlog
import torch
from corpora import publish_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from retrieval_world import PAPERS, needs_minilm, settings_for
from structlog.testing import capture_logs

from services.retrieval.build import build
from services.retrieval.card_index import GROUP, SIZE, CardIndex
from services.retrieval.index import FlatIndex
from services.retrieval.placement import Card, on_cards, open_index, spread
from services.retrieval.search import Searcher
from shared.files import ArtifactError
from shared.metrics import metrics_text

DIM = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rounded_vectors(count: int, seed: int = 0, dim: int = DIM) -> NDArray[np.float32]:
    """Random vectors of about length 1 that float16 holds exactly, so that both indexes have the same."""
    vectors = np.random.default_rng(seed).normal(size=(count, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rounded: NDArray[np.float32] = vectors.astype(np.float16).astype(np.float32)
    return rounded


def flat_of(vectors: NDArray[np.float32]) -> FlatIndex:
    flat = FlatIndex.empty(vectors.shape[1])
    flat.add(vectors)
    return flat


@settings(deadline=None, max_examples=60)
@given(
    shards=st.lists(st.integers(1, 3 * GROUP), min_size=1, max_size=4),
    k=st.integers(1, 700),
    queries=st.integers(0, 9),
    score_bytes=st.integers(1, 40_000),
)
def test_any_shards_and_parts_give_what_faiss_gives(shards: list[int], k: int, queries: int, score_bytes: int) -> None:
    stored, asked = rounded_vectors(sum(shards)), rounded_vectors(queries, seed=1)
    flat = flat_of(stored)
    index = CardIndex.of(flat, [(DEVICE, rows) for rows in shards], score_bytes=score_bytes)
    assert (len(index), index.dim) == (sum(shards), DIM)
    found, expected = index.search(asked, k), flat.search(asked, k)
    assert len(found) == queries
    for query, hits, best in zip(asked, found, expected, strict=True):
        scores = [score for score, _ in hits]
        np.testing.assert_allclose(scores, [score for score, _ in best], atol=1e-5)
        # Each row once and with its own score; rows of equal scores may come in any order.
        assert len({row for _, row in hits}) == len(hits) == min(k, sum(shards))
        np.testing.assert_allclose([stored[row] @ query for _, row in hits], scores, atol=1e-5)


def test_negative_scores_are_found_and_the_fill_of_the_last_group_never_is() -> None:
    stored = -np.abs(rounded_vectors(GROUP + 1))
    index = CardIndex.of(flat_of(stored), [(DEVICE, len(stored))])
    (hits,) = index.search(np.abs(rounded_vectors(1, seed=1)), 2 * GROUP)
    assert sorted(row for _, row in hits) == list(range(len(stored)))
    assert all(score < 0 for score, _ in hits)


def test_rows_of_equal_scores_are_each_found_once() -> None:
    stored = np.repeat(rounded_vectors(2), 2 * GROUP, axis=0)
    index = CardIndex.of(flat_of(stored), [(DEVICE, len(stored))])
    (hits,) = index.search(stored[:1], 2 * GROUP)
    assert sorted(row for _, row in hits) == list(range(2 * GROUP))


def test_the_stored_vectors_can_be_read_back_from_any_shard() -> None:
    stored = rounded_vectors(200)
    index = CardIndex.of(flat_of(stored), [(DEVICE, 70), (DEVICE, 130)])
    rows = np.array([199, 0, 69, 70, 0])
    np.testing.assert_array_equal(index.vectors(rows), stored[rows])


def test_float16_keeps_the_ranking_of_float32_but_for_near_ties() -> None:
    generator = np.random.default_rng(3)
    stored = generator.normal(size=(5000, 384)).astype(np.float32)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    flat = flat_of(stored)
    asked = stored[:100] + 0.05 * generator.normal(size=(100, 384)).astype(np.float32)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    exact, found = flat.search(asked, 10), CardIndex.of(flat, [(DEVICE, 5000)]).search(asked, 10)
    for best, hits in zip(exact, found, strict=True):
        np.testing.assert_allclose([s for s, _ in hits], [s for s, _ in best], atol=2e-4)
        assert hits[0][1] == best[0][1]
    same = [len({r for _, r in a} & {r for _, r in b}) / 10 for a, b in zip(exact, found, strict=True)]
    assert np.mean(same) > 0.99


@given(st.integers(1, 10_000), st.integers(1, 4096), st.lists(st.integers(-(10**6), 10**7), min_size=1, max_size=8))
def test_rows_are_spread_within_each_cards_room_or_not_at_all(rows: int, row_bytes: int, rooms: list[int]) -> None:
    counts = spread(rows, row_bytes, rooms)
    if not counts:
        assert sum(max(0, room) // (row_bytes * GROUP) * GROUP for room in rooms) < rows
        return
    assert sum(counts) == rows
    for count, room in zip(counts, rooms, strict=True):
        assert -(-count // GROUP) * GROUP * row_bytes <= max(0, room)


def asked_for(free: int, asked: list[str], name: str) -> Card:
    def free_bytes() -> int:
        asked.append(name)
        return free

    return Card(DEVICE, free_bytes)


@pytest.mark.parametrize(
    ("free_rows", "needed"), [([3 * GROUP, 0], 1), ([2 * GROUP, GROUP, 9 * GROUP], 2), ([0, 9 * GROUP], 2)]
)
def test_no_more_cards_are_asked_and_filled_than_are_needed(free_rows: list[int], needed: int) -> None:
    asked: list[str] = []
    there = [asked_for(rows * DIM * SIZE, asked, str(number)) for number, rows in enumerate(free_rows)]
    stored = rounded_vectors(3 * GROUP - 1)
    index = on_cards(flat_of(stored), there, 0)
    assert index is not None
    assert asked == [str(number) for number in range(needed)]
    assert index.search(stored[:1], 1)[0][0][1] == 0


def test_vectors_that_fit_no_card_stay_on_the_cpu_and_the_log_says_both_numbers() -> None:
    flat = flat_of(rounded_vectors(1000))
    with capture_logs() as logs:
        assert on_cards(flat, [Card("cpu", lambda: 3 << 30), Card("cpu", lambda: 1 << 30)], 3.0) is None
    (line,) = logs
    assert line["log_level"] == "warning"
    assert (line["needed_gb"], line["free_gb"], line["reserve_gb"]) == (0.0, [3.0, 1.0], 3.0)


def test_without_a_gpu_the_index_is_searched_on_the_cpu_and_its_size_is_a_metric(tmp_path: Path) -> None:
    flat_of(rounded_vectors(100)).write(tmp_path)
    assert isinstance(open_index(tmp_path, settings_for(tmp_path).retrieval, None), FlatIndex)
    assert f'drzero_retrieval_index_bytes{{place="cpu"}} {100.0 * DIM * 4}' in metrics_text()[0].decode()


def test_a_gpu_that_is_demanded_and_absent_is_one_sentence(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    flat_of(rounded_vectors(3)).write(tmp_path)
    with pytest.raises(ArtifactError, match=r"retrieval\.index\.device is 'cuda', but torch sees no GPU"):
        open_index(tmp_path, settings_for(tmp_path, RETRIEVAL__INDEX__DEVICE="cuda").retrieval, None)


@needs_minilm
def test_a_searcher_finds_the_same_papers_in_float16(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS)
    build(settings_for(tmp_path), structlog.get_logger())
    searcher = Searcher(settings_for(tmp_path))
    queries = [paper.title for paper in PAPERS[::7]]
    exact = searcher.search(queries, 3)
    searcher.index = CardIndex.of(FlatIndex.read(tmp_path / "index"), [(DEVICE, 30), (DEVICE, len(PAPERS) - 30)])
    for best, hits in zip(exact, searcher.search(queries, 3), strict=True):
        assert [hit.paper.pmid for hit in hits] == [hit.paper.pmid for hit in best]
