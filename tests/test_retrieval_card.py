"""Search as it runs on GPUs: on one where there is one, else on the device "cpu" with the same roundings; placement."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_world import settings_for
from structlog.testing import capture_logs
from vector_world import Mask, Vectors, clustered, surely, tied_vectors, unit, unit_vectors

from services.retrieval import vector_file
from services.retrieval.card_index import GROUP, SIZE, CardIndex
from services.retrieval.flat_index import FlatIndex
from services.retrieval.index import VectorIndex
from services.retrieval.placement import Card, on_cards, open_vectors, spread
from shared.files import ArtifactError
from shared.metrics import metrics_text

DIM = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_card(stored: Vectors, shards: list[int], *, score_bytes: int = 1 << 28) -> VectorIndex:
    return VectorIndex(stored, CardIndex.of(stored, [(DEVICE, rows) for rows in shards], score_bytes=score_bytes))


@settings(deadline=None, max_examples=60)
@given(
    shards=st.lists(st.integers(1, 3 * GROUP), min_size=1, max_size=4),
    top_k=st.integers(1, 700),
    queries=tied_vectors(st.integers(0, 9), DIM),
    score_bytes=st.integers(1, 40_000),
    data=st.data(),
)
def test_any_shards_and_parts_give_the_best_rows_of_exact_scores(
    shards: list[int], top_k: int, queries: Vectors, score_bytes: int, data: st.DataObject
) -> None:
    stored = data.draw(tied_vectors(st.just(sum(shards)), DIM))
    index = on_card(stored, shards, score_bytes=score_bytes)
    assert (len(index), index.dim) == (sum(shards), DIM)
    assert index.search(queries, top_k) == [surely(stored, query, top_k) for query in queries]


@settings(deadline=None, max_examples=40)
@given(
    shards=st.lists(st.integers(1, 2 * GROUP), min_size=1, max_size=3),
    top_k=st.integers(1, 300),
    share=st.floats(0, 1),
    score_bytes=st.integers(1, 40_000),
)
def test_a_mask_leaves_the_best_of_the_rows_that_it_allows(
    shards: list[int], top_k: int, share: float, score_bytes: int
) -> None:
    rows = sum(shards)
    stored, queries = unit_vectors(rows), unit_vectors(5, seed=1)
    one, other = (np.random.default_rng(seed).random(rows) < share for seed in (0, 1))
    masks: list[Mask | None] = [one, None, other, one, ~one]
    finder = CardIndex.of(stored, [(DEVICE, count) for count in shards], score_bytes=score_bytes)
    expected = [surely(stored, query, top_k, mask) for query, mask in zip(queries, masks, strict=True)]
    assert VectorIndex(stored, finder).search(queries, top_k, masks) == expected
    finder.few = 0  # so few rows are gathered and read on the CPU; looked for on the card, they must be the same
    assert VectorIndex(stored, finder).search(queries, top_k, masks) == expected


def test_negative_scores_are_found_and_the_fill_of_the_last_group_never_is() -> None:
    stored = -np.abs(unit_vectors(GROUP + 1))
    (hits,) = on_card(stored, [len(stored)]).search(np.abs(unit_vectors(1, seed=1)), 2 * GROUP)
    assert sorted(row for _, row in hits) == list(range(len(stored)))
    assert all(score < 0 for score, _ in hits)


def test_float16_on_a_card_gives_the_bits_and_the_order_of_float32_on_the_cpu() -> None:
    stored = clustered(5000, 384)
    # Half of them differ by less than float16 tells.
    stored = np.concatenate([stored, unit(stored + 1e-5 * np.random.default_rng(0).normal(size=stored.shape))])
    queries = clustered(100, 384, seed=3)
    assert on_card(stored, [3000, 7000]).search(queries, 10) == VectorIndex(stored, FlatIndex(stored)).search(
        queries, 10
    )


def test_a_query_finds_the_same_bits_alone_and_in_a_batch() -> None:
    stored, queries = clustered(5000), clustered(64, seed=9)
    index = on_card(stored, [2000, 3000])
    assert [index.search(query[None], 20)[0] for query in queries] == index.search(queries, 20)


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
    stored = unit_vectors(3 * GROUP - 1)
    finder = on_cards(stored, there, 0)
    assert finder is not None
    assert asked == [str(number) for number in range(needed)]
    assert VectorIndex(stored, finder).search(stored[:1], 1) == [surely(stored, stored[0], 1)]


def test_vectors_that_fit_no_card_stay_on_the_cpu_and_the_log_says_both_numbers() -> None:
    with capture_logs() as logs:
        assert on_cards(unit_vectors(1000), [Card("cpu", lambda: 3 << 30), Card("cpu", lambda: 1 << 30)], 3.0) is None
    (line,) = logs
    assert line["log_level"] == "warning"
    assert (line["needed_gb"], line["free_gb"], line["reserve_gb"]) == (0.0, [3.0, 1.0], 3.0)


def test_without_a_gpu_the_vectors_are_searched_on_the_cpu_and_their_size_is_a_metric(tmp_path: Path) -> None:
    stored = unit_vectors(100)
    vector_file.write(tmp_path, [stored], rows=100, dim=DIM)
    index = open_vectors(tmp_path, settings_for(tmp_path).retrieval, None)
    assert index.search(stored[:1], 3) == [surely(stored, stored[0], 3)]
    assert f'drzero_retrieval_index_bytes{{place="cpu"}} {100.0 * DIM * 4}' in metrics_text()[0].decode()


def test_a_gpu_that_is_demanded_and_absent_is_one_sentence(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    vector_file.write(tmp_path, [unit_vectors(3)], rows=3, dim=DIM)
    with pytest.raises(ArtifactError, match=r"retrieval\.index\.device is 'cuda', but torch sees no GPU"):
        open_vectors(tmp_path, settings_for(tmp_path, RETRIEVAL__INDEX__DEVICE="cuda").retrieval, None)
