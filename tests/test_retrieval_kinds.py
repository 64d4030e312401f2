"""The kinds of index: how much each finds, filters, what its memory and its files are, what cannot be had."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from retrieval_world import settings_for
from structlog.testing import capture_logs
from vector_world import Mask, Vectors, clustered, found_share, surely, unit_vectors

from services.retrieval import faiss_index
from services.retrieval.faiss_index import file_of
from services.retrieval.index import VectorIndex
from services.retrieval.placement import open_vectors
from services.retrieval.vectors import FLAT_ROWS, Kind, bytes_needed, kind_for, require_memory, write_vectors
from shared.command import UsageError
from shared.files import ArtifactError
from shared.settings import IndexSettings, Settings

KINDS: tuple[Kind, ...] = ("flat", "hnsw", "ivf_sq", "ivf_pq")
APPROXIMATE: tuple[faiss_index.Kind, ...] = ("hnsw", "ivf_sq", "ivf_pq")
ROWS, DIM = 2000, 64
STORED = clustered(ROWS, DIM)
QUERIES = np.concatenate([STORED[:20], clustered(30, DIM, seed=1)])


def settings_of(folder: Path, kind: str, **more: str) -> Settings:
    return settings_for(folder, RETRIEVAL__INDEX__KIND=kind, RETRIEVAL__INDEX__PQ_BYTES="16", **more)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    """An index of every kind, with the same vectors."""
    made: dict[Kind, Path] = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        write_vectors(folder, STORED, settings_of(folder, kind))
    return made


def opened(folders: dict[Kind, Path], kind: Kind, **more: str) -> VectorIndex:
    return open_vectors(folders[kind], settings_of(folders[kind], kind, **more).retrieval, None)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_nine_of_ten_with_exact_scores_in_order(kind: Kind, folders: dict[Kind, Path]) -> None:
    index = opened(folders, kind)
    found, best = index.search(QUERIES, 10), [surely(STORED, query, 10) for query in QUERIES]
    assert (len(index), index.dim) == (ROWS, DIM)
    assert found_share(found, best) >= (1.0 if kind == "flat" else 0.9)
    for query, hits in zip(QUERIES, found, strict=True):
        rows = np.array([row for _, row in hits])
        assert hits == surely(STORED, query, 10, np.isin(np.arange(ROWS), rows))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_the_same_alone_and_in_a_batch(kind: Kind, folders: dict[Kind, Path]) -> None:
    index = opened(folders, kind)
    assert [index.search(query[None], 10)[0] for query in QUERIES] == index.search(QUERIES, 10)


def mask_of(share: float, seed: int = 0) -> Mask:
    return np.random.default_rng(seed).random(ROWS) < share


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.004, 0.3, 0.8])
def test_a_filter_gives_full_results_of_allowed_rows(share: float, kind: Kind, folders: dict[Kind, Path]) -> None:
    index, mask = opened(folders, kind), mask_of(share)
    masks = [mask if number % 2 else None for number in range(len(QUERIES))]
    best = [surely(STORED, query, 10, allowed) for query, allowed in zip(QUERIES, masks, strict=True)]
    found = index.search(QUERIES, 10, masks)
    assert [len(hits) for hits in found] == [len(hits) for hits in best]
    assert found[::2] == index.search(QUERIES[::2], 10)
    assert all(mask[row] for hits in found[1::2] for _, row in hits)
    if kind == "flat" or share < 0.01:
        assert found[1::2] == best[1::2]
    elif share:
        assert found_share(found[1::2], best[1::2]) >= 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_broad_filter_is_left_to_the_finder_and_still_gives_full_results(
    kind: Kind, folders: dict[Kind, Path]
) -> None:
    index, mask = opened(folders, kind), mask_of(0.9)
    assert np.count_nonzero(mask) > index.finder.few
    found = index.search(QUERIES, 10, [mask] * len(QUERIES))
    assert all(mask[row] for hits in found for _, row in hits)
    assert found_share(found, [surely(STORED, query, 10, mask) for query in QUERIES]) >= 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_filter_for_another_subject_than_the_querys_loses_no_more(kind: Kind, folders: dict[Kind, Path]) -> None:
    index = opened(folders, kind)
    subjects = (STORED @ STORED[37 * number] for number in range(len(QUERIES)))
    masks: list[Mask | None] = [near > np.quantile(near, 0.4) for near in subjects]
    found = index.search(QUERIES, 10, masks)
    best = [surely(STORED, query, 10, mask) for query, mask in zip(QUERIES, masks, strict=True)]
    assert found_share(found, best) >= 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_all_rows_is_all_rows_in_order(kind: Kind, folders: dict[Kind, Path]) -> None:
    index, mask = opened(folders, kind), mask_of(0.9)
    assert index.search(QUERIES[:1], ROWS + 5) == [surely(STORED, QUERIES[0], ROWS)]
    assert index.search(QUERIES[:1], ROWS, [mask]) == [surely(STORED, QUERIES[0], ROWS, mask)]


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_more_effort_finds_more(kind: Kind, folders: dict[Kind, Path]) -> None:
    best = [surely(STORED, query, 10) for query in QUERIES]
    name = "HNSW_EF" if kind == "hnsw" else "PROBES"
    shares = [
        found_share(opened(folders, kind, **{f"RETRIEVAL__INDEX__{name}": effort}).search(QUERIES, 10), best)
        for effort in ("1", "200")
    ]
    assert shares == sorted(shares)
    assert shares[1] >= 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_recall_is_measured_and_the_memory_is_about_what_was_foretold(kind: Kind, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, kind)
    with capture_logs() as logs:
        counts = write_vectors(tmp_path, STORED, settings)
        index = open_vectors(tmp_path, settings.retrieval, None)
    assert (1000 if kind == "flat" else 800) <= counts["recall_at_10_permille"] <= 1000
    needed = bytes_needed(kind, ROWS, DIM, settings.retrieval.index)
    (held,) = index.bytes_by_place.values()
    assert needed == pytest.approx(held, rel=0.25)
    stated = [line for line in logs if line["event"] == "memory of the vectors"]
    assert len(stated) == (1 if kind == "flat" else 2)  # of the search, and before it of the building
    assert all(line["needed_gb"] <= line["available_gb"] <= line["total_gb"] for line in stated)


def test_recall_by_given_queries_is_that_of_those_queries(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "ivf_sq", RETRIEVAL__INDEX__PROBES="1")
    easy, hard = (write_vectors(tmp_path, STORED, settings, queries=some) for some in (STORED[:100], QUERIES[20:]))
    found = open_vectors(tmp_path, settings.retrieval, None).search(QUERIES[20:], 10)
    share = found_share(found, [surely(STORED, query, 10) for query in QUERIES[20:]])
    assert hard == {"recall_at_10_permille": round(1000 * share)}
    assert easy != hard


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_one_thread_makes_the_same_index_of_the_same_vectors(
    kind: faiss_index.Kind, folders: dict[Kind, Path], tmp_path: Path
) -> None:
    write_vectors(tmp_path, STORED, settings_of(tmp_path, kind))
    assert (tmp_path / file_of(kind)).read_bytes() == (folders[kind] / file_of(kind)).read_bytes()


def test_auto_goes_by_size_and_a_demand_for_gpus_is_exact() -> None:
    auto = IndexSettings(kind="auto")
    assert [kind_for(auto, rows) for rows in (0, FLAT_ROWS, FLAT_ROWS + 1, 10**8)] == ["flat", "flat", "hnsw", "hnsw"]
    assert kind_for(IndexSettings(kind="auto", device="cuda"), 10**8) == "flat"
    assert [kind_for(IndexSettings(kind=kind), 3) for kind in KINDS] == list(KINDS)


def test_each_kind_needs_less_memory_than_the_one_before() -> None:
    needs = [bytes_needed(kind, 10**6, 384, IndexSettings()) for kind in KINDS]
    assert all(more > less for more, less in pairwise(needs))


def test_auto_takes_what_was_built(folders: dict[Kind, Path]) -> None:
    settings = settings_of(folders["hnsw"], "auto").retrieval
    assert open_vectors(folders["hnsw"], settings, None).finder.slack is not None  # so few rows are searched exactly


def test_a_kind_that_was_not_built_is_refused_with_its_file(folders: dict[Kind, Path]) -> None:
    with pytest.raises(ArtifactError, match=r"expected hnsw\.faiss in .*make the index again"):
        open_vectors(folders["flat"], settings_of(folders["flat"], "hnsw").retrieval, None)


def test_a_gpu_that_is_demanded_for_lists_is_one_sentence(folders: dict[Kind, Path]) -> None:
    settings = settings_of(folders["ivf_sq"], "ivf_sq", RETRIEVAL__INDEX__DEVICE="cuda").retrieval
    with pytest.raises(ArtifactError, match="GPUs search exactly; set the kind to flat"):
        open_vectors(folders["ivf_sq"], settings, None)


@pytest.mark.parametrize("kind", APPROXIMATE)
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_damaged_file_is_named(
    kept: float, kind: faiss_index.Kind, folders: dict[Kind, Path], tmp_path: Path
) -> None:
    for name in ("vectors.npy", file_of(kind)):
        (tmp_path / name).write_bytes((folders[kind] / name).read_bytes())
    content = (tmp_path / file_of(kind)).read_bytes()
    (tmp_path / file_of(kind)).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ArtifactError, match=rf"{kind}\.faiss is no index that FAISS can read; delete .* make it again"):
        open_vectors(tmp_path, settings_of(tmp_path, kind).retrieval, None)


def test_a_file_of_other_vectors_is_refused(folders: dict[Kind, Path], tmp_path: Path) -> None:
    write_vectors(tmp_path, STORED[:-1], settings_of(tmp_path, "flat"))
    (tmp_path / file_of("hnsw")).write_bytes((folders["hnsw"] / file_of("hnsw")).read_bytes())
    with pytest.raises(ArtifactError, match=f"expected {ROWS - 1} vectors in .*hnsw.faiss, found {ROWS}"):
        open_vectors(tmp_path, settings_of(tmp_path, "hnsw").retrieval, None)


def test_vectors_that_cannot_be_made_into_codes_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"pq_bytes is 16, expected a divisor .*length 40; set .*PQ_BYTES=10"):
        write_vectors(tmp_path, unit_vectors(300, 40), settings_of(tmp_path, "ivf_pq"))
    with pytest.raises(UsageError, match=r"takes 256 papers at least, found 255; set .*=flat"):
        write_vectors(tmp_path, unit_vectors(255, 64), settings_of(tmp_path, "ivf_pq"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", [1, 2, 5, 30])
@pytest.mark.parametrize("kind", ["hnsw", "ivf_sq"])
def test_a_few_vectors_make_an_index_of_any_kind(kind: str, rows: int, tmp_path: Path) -> None:
    stored = unit_vectors(rows, 16)
    write_vectors(tmp_path, stored, settings_of(tmp_path, kind))
    found = open_vectors(tmp_path, settings_of(tmp_path, kind).retrieval, None).search(stored, rows)
    assert found == [surely(stored, query, rows) for query in stored]


def test_memory_that_can_never_be_had_is_refused_and_what_is_taken_now_is_a_warning() -> None:
    with pytest.raises(ArtifactError, match=r"searching needs 9\.00 GB of memory, found 8\.00 GB in all; .*=ivf_pq"):
        require_memory("searching", 9 * 10**9, (8.0, 8.0))
    with capture_logs() as logs:
        require_memory("searching", 5 * 10**9, (8.0, 4.0))
        require_memory("searching", 3 * 10**9, (8.0, 4.0))
    assert [line["log_level"] for line in logs] == ["warning", "info"]
    assert (logs[0]["needed_gb"], logs[0]["available_gb"], logs[0]["total_gb"]) == (5.0, 4.0, 8.0)


def test_a_map_of_the_file_itself_is_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", STORED)
    before = (tmp_path / "vectors.npy").stat().st_ino
    filled: Vectors = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    write_vectors(tmp_path, filled, settings_of(tmp_path, "flat"))
    assert (tmp_path / "vectors.npy").stat().st_ino == before
    with pytest.raises(ValueError, match="expected 3 vectors"):
        write_vectors(tmp_path, STORED[:3], settings_of(tmp_path, "flat"))
