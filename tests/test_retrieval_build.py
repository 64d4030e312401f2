"""Building and opening an index: reuse, what makes it stale, refusals, a killed build, the choice of a runtime."""

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import structlog
from corpora import publish_corpus
from hypothesis import given
from hypothesis import strategies as st
from retrieval_world import PAPERS, environment, needs_minilm, settings_for

from services.ingest.demo import read_demo
from services.retrieval import vector_file
from services.retrieval.build import build
from services.retrieval.encoder import GRAPH, has_openvino, runtime_for
from services.retrieval.known import KnownVectors, digests
from services.retrieval.parts import read_part, write_part
from services.retrieval.runtime import CHUNK, MEASURE_FROM, NOTE, Decision, decide
from services.retrieval.search import Searcher
from shared.command import UsageError
from shared.corpus import Corpus
from shared.files import ArtifactError, Manifest, read_manifest
from shared.records import Paper

pytestmark = needs_minilm

needs_openvino = pytest.mark.skipif(not has_openvino(), reason="openvino has no build for this processor")
LOG: structlog.stdlib.BoundLogger = structlog.get_logger()


def command(folder: Path, module: str = "services.retrieval.build", **more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", module],
        env=environment(folder, **more),
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_second_build_keeps_the_index_and_a_changed_setting_or_corpus_makes_it_again(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS)
    settings = settings_for(tmp_path)
    assert build(settings, LOG)
    first = read_manifest(tmp_path / "index", verify=True)
    assert first.rows == len(PAPERS)
    assert not build(settings, LOG)
    assert not build(settings_for(tmp_path, RETRIEVAL__ENCODER__BATCH_SIZE="5"), LOG)
    assert read_manifest(tmp_path / "index") == first
    assert build(settings_for(tmp_path, RETRIEVAL__ENCODER__MAX_TOKENS="16"), LOG)
    assert read_manifest(tmp_path / "index").settings["max_tokens"] == 16
    publish_corpus(tmp_path, PAPERS[:-1])
    assert build(settings, LOG)
    assert read_manifest(tmp_path / "index").rows == len(PAPERS) - 1


def test_only_new_texts_are_embedded_and_the_index_is_the_same_as_one_made_afresh(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS[:-2])
    exactly = {"RETRIEVAL__ENCODER__DTYPE": "float32"}
    build(settings_for(tmp_path, **exactly), LOG)
    changed = [PAPERS[-1], *PAPERS[1:], replace(PAPERS[0], title="Another title altogether")]
    publish_corpus(tmp_path, changed)
    build(settings_for(tmp_path, **exactly), LOG)
    counts = read_manifest(tmp_path / "index").counts
    # New are the last two papers, one of them twice, and the changed title.
    assert (counts["embedded"], counts["reused"]) == (4, len(changed) - 4)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    publish_corpus(fresh, changed)
    build(settings_for(fresh, **exactly), LOG)
    mixed, made = (vector_file.read(folder / "index") for folder in (tmp_path, fresh))
    np.testing.assert_allclose(mixed, made, atol=1e-5)


def test_vectors_of_another_encoder_are_not_taken_over(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS)
    build(settings_for(tmp_path), LOG)
    build(settings_for(tmp_path, RETRIEVAL__ENCODER__MAX_TOKENS="16"), LOG)
    assert read_manifest(tmp_path / "index").counts["reused"] == 0


@given(st.lists(st.text(max_size=8)), st.lists(st.text(max_size=8)))
def test_an_earlier_row_is_found_by_its_text_and_by_nothing_else(earlier: list[str], texts: list[str]) -> None:
    known = KnownVectors(None, digests(earlier))
    for text, row in zip(texts, known.rows(digests(texts)), strict=True):
        assert (row >= 0) == (text in earlier)
        assert row < 0 or earlier[row] == text


def test_a_second_command_says_that_the_index_is_kept(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS)
    build(settings_for(tmp_path), LOG)
    process = command(tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "index is current and is kept" in errors


def test_an_index_of_another_corpus_is_refused(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS)
    build(settings_for(tmp_path), LOG)
    publish_corpus(tmp_path, [replace(paper, title=paper.title.upper()) for paper in PAPERS])
    with pytest.raises(ArtifactError, match=r"index made from another corpus: expected .* `python -m services"):
        Searcher(settings_for(tmp_path))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"RETRIEVAL__ENCODER__POOLING": "cls"}, r"expected pooling = 'cls'.*made with 'mean'"),
        ({"RETRIEVAL__ENCODER__MAX_TOKENS": "65"}, r"expected max_tokens = 65.*made with 64"),
    ],
)
def test_an_index_of_another_encoder_is_refused(change: dict[str, str], named: str, tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS[:3])
    build(settings_for(tmp_path), LOG)
    with pytest.raises(ArtifactError, match=named):
        Searcher(settings_for(tmp_path, **change))


def test_no_index_and_no_corpus_name_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"python -m services\.ingest"):
        build(settings_for(tmp_path), LOG)
    publish_corpus(tmp_path, PAPERS[:3])
    with pytest.raises(ArtifactError, match=r"python -m services\.retrieval\.build"):
        Searcher(settings_for(tmp_path))


def test_a_full_disk_stops_the_build_before_it_starts(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS[:3])
    with pytest.raises(ArtifactError, match="free disk"):
        build(settings_for(tmp_path, STORAGE__MIN_FREE_GB="1e9"), LOG)


def test_the_command_without_a_corpus_ends_with_one_sentence(tmp_path: Path) -> None:
    process = command(tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("retrieval.build: expected")
    assert errors.count("\n") == 1


def test_a_killed_build_leaves_the_old_index_and_the_next_one_finishes(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS)
    settings, changed = settings_for(tmp_path), {"RETRIEVAL__ENCODER__MAX_TOKENS": "48"}
    build(settings, LOG)
    old = read_manifest(tmp_path / "index")
    kill_when_there_is(tmp_path / ".index.building", command(tmp_path, **changed))
    assert (tmp_path / ".index.building").exists()
    assert read_manifest(tmp_path / "index", verify=True) == old
    assert Searcher(settings).search([PAPERS[5].text], 1)[0][0].paper == PAPERS[5]
    assert build(settings_for(tmp_path, **changed), LOG)
    assert not (tmp_path / ".index.building").exists()


def kill_when_there_is(file: Path, process: "subprocess.Popen[str]") -> None:
    """End the process with SIGKILL as soon as the file is there."""
    while not file.exists():
        assert process.poll() is None, "the build ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


def many_papers(count: int) -> list[Paper]:
    """Papers with different texts."""
    return [
        replace(PAPERS[number % len(PAPERS)], pmid=str(5000 + number), title=f"Report {number}")
        for number in range(count)
    ]


def finished(folder: Path, module: str = "services.retrieval.build", **more: str) -> Manifest:
    """The manifest of an index that a process of its own makes."""
    process = command(folder, module, **more)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return read_manifest(folder / "index")


def part_of(folder: Path, first: int) -> Path:
    """The file of a part in the working folder of the build of `folder`/index."""
    (work,) = (folder / ".index-parts").iterdir()
    return work / f"part-{first:09d}.npz"


def test_a_build_killed_in_the_middle_goes_on_and_gives_the_index_of_an_undisturbed_one(tmp_path: Path) -> None:
    runtime = "openvino" if has_openvino() else "torch"
    quick = {"RETRIEVAL__ENCODER__MAX_TOKENS": "8", "RETRIEVAL__ENCODER__RUNTIME": runtime}
    quick["RETRIEVAL__ENCODER__DTYPE"] = "float32"
    papers = many_papers(CHUNK + 300)
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    for folder in (disturbed, undisturbed):
        folder.mkdir()
        publish_corpus(folder, papers, shard_rows=1000)
    killed = command(disturbed, **quick)
    while not (disturbed / ".index-parts").exists() or not [*(disturbed / ".index-parts").iterdir()]:
        assert killed.poll() is None, "the build ended before it could be killed"
    kill_when_there_is(part_of(disturbed, 0), killed)
    found, expected = finished(disturbed, **quick), finished(undisturbed, **quick)
    assert found.counts["resumed"] >= CHUNK
    assert found.counts["embedded"] + found.counts["resumed"] == len(papers)
    assert (found.settings, found.made_from, found.rows) == (expected.settings, expected.made_from, expected.rows)
    mixed, made = (vector_file.read(folder / "index") for folder in (disturbed, undisturbed))
    np.testing.assert_allclose(mixed, made, atol=1e-6)
    if runtime == "openvino":  # its vectors are the same bits in any batch; the word index has names of its own
        assert without_words(found) == without_words(expected)
    assert not (disturbed / ".index-parts").exists()


def without_words(manifest: Manifest) -> dict[str, str]:
    """The hashes of all files but those of the word index."""
    return {name: digest for name, digest in manifest.files.items() if not name.startswith("words/")}


def test_a_build_with_another_encoder_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS)
    stale = tmp_path / ".index-parts" / "another-encoder"
    stale.mkdir(parents=True)
    (stale / "part-000000000.npz").touch()
    build(settings_for(tmp_path), LOG)
    assert not (tmp_path / ".index-parts").exists()


@given(st.lists(st.text(max_size=8), min_size=1, max_size=9), st.data())
def test_a_part_is_read_for_its_texts_only_and_a_damaged_one_is_none(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    vectors = np.random.default_rng(len(texts)).normal(size=(len(texts), 4)).astype(np.float32)
    write_part(folder, 0, digests(texts), vectors)
    np.testing.assert_array_equal(read_part(folder, 0, digests(texts)), vectors)
    assert read_part(folder, 1, digests(texts)) is None
    assert read_part(folder, 0, digests([*texts, "more"])) is None
    assert read_part(folder, 0, digests(["other " + texts[0], *texts[1:]])) is None
    file = folder / "part-000000000.npz"
    file.write_bytes(file.read_bytes()[: data.draw(st.integers(0, file.stat().st_size - 1))])
    assert read_part(folder, 0, digests(texts)) is None


def test_a_flipped_bit_in_a_parts_vectors_is_noticed(tmp_path: Path) -> None:
    write_part(tmp_path, 0, digests(["a"]), np.full((1, 64), 0.5, dtype=np.float32))
    file = tmp_path / "part-000000000.npz"
    content = bytearray(file.read_bytes())
    content[content.index(np.full(64, 0.5, dtype=np.float32).tobytes()) + 7] ^= 1
    file.write_bytes(content)
    assert read_part(tmp_path, 0, digests(["a"])) is None


def test_a_kind_that_cannot_be_made_is_refused_before_anything_is_embedded(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS)
    with pytest.raises(UsageError, match="ivf_pq"):
        build(settings_for(tmp_path, RETRIEVAL__INDEX__KIND="ivf_pq"), LOG)
    assert not [*tmp_path.rglob("part-*.npz")]


@needs_openvino
def test_auto_measures_both_runtimes_and_takes_the_faster(tmp_path: Path) -> None:
    publish_corpus(tmp_path, read_demo())
    assert len(read_demo()) >= MEASURE_FROM
    settings = settings_for(tmp_path)
    build(settings, LOG)
    manifest = read_manifest(tmp_path / "index")
    torch, openvino = (manifest.counts[f"{name}_texts_per_second"] for name in ("torch", "openvino"))
    assert (GRAPH in manifest.files) == (openvino >= torch)
    assert runtime_for(settings, tmp_path / "index") == ("openvino" if openvino >= torch else "torch")


@needs_openvino
def test_a_decision_stands_for_the_build_that_goes_on_until_another_runtime_is_set(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS)
    corpus = Corpus(tmp_path / "corpus")
    kept = {"asked": "openvino", "chunk": 7, "rates": {"torch": 3}}
    (tmp_path / NOTE).write_text(json.dumps(kept))
    (tmp_path / GRAPH).write_text("half a graph")
    asking = {name: settings_for(tmp_path, RETRIEVAL__ENCODER__RUNTIME=name) for name in ("openvino", "torch")}
    assert decide(asking["openvino"], corpus, tmp_path) == Decision("openvino", 7, {"torch": 3})
    assert (tmp_path / GRAPH).exists()
    for _ in range(2):
        assert decide(asking["torch"], corpus, tmp_path) == Decision("torch", CHUNK, {})
        assert not (tmp_path / GRAPH).exists()


@needs_openvino
def test_an_index_that_goes_on_from_another_takes_its_graph_unless_that_is_damaged(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, RETRIEVAL__ENCODER__RUNTIME="openvino")
    publish_corpus(tmp_path, PAPERS[:-2])
    build(settings, LOG)
    graph = (tmp_path / "index" / GRAPH).read_bytes()
    publish_corpus(tmp_path, PAPERS[:-1])
    build(settings, LOG)
    assert (tmp_path / "index" / GRAPH).read_bytes() == graph
    (tmp_path / "index" / GRAPH).write_bytes(graph[:-1])
    publish_corpus(tmp_path, PAPERS)
    build(settings, LOG)
    assert len(Searcher(settings).search(["sepsis"], 5)[0]) == 5


def test_damaged_vectors_are_not_taken_over(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS[:-1])
    build(settings_for(tmp_path), LOG)
    file = tmp_path / "index" / vector_file.FILE
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    publish_corpus(tmp_path, PAPERS)
    build(settings_for(tmp_path), LOG)
    assert read_manifest(tmp_path / "index").counts["reused"] == 0


@needs_openvino
def test_changing_the_runtime_keeps_the_index_and_what_it_finds(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS)
    by_name = {name: settings_for(tmp_path, RETRIEVAL__ENCODER__RUNTIME=name) for name in ("openvino", "torch")}
    assert build(by_name["openvino"], LOG)
    assert not build(by_name["torch"], LOG)
    queries = [paper.title for paper in PAPERS]
    found, expected = (shown(Searcher(by_name[name]), queries) for name in by_name)
    assert [[pmid for pmid, _ in hits] for hits in found] == [[pmid for pmid, _ in hits] for hits in expected]
    for hits, others in zip(found, expected, strict=True):
        np.testing.assert_allclose([score for _, score in hits], [score for _, score in others], atol=1e-3)


def shown(searcher: Searcher, queries: Sequence[str]) -> list[list[tuple[str, float]]]:
    """PMID and score of each query's hits."""
    return [[(hit.paper.pmid, hit.score) for hit in hits] for hits in searcher.search(queries, 10)]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_a_ray_cluster_makes_the_index_of_the_plain_build(tmp_path: Path) -> None:
    quick = {"RETRIEVAL__ENCODER__MAX_TOKENS": "16"}
    plain, spread = tmp_path / "plain", tmp_path / "spread"
    for folder in (plain, spread):
        folder.mkdir()
        publish_corpus(folder, many_papers(CHUNK + 300), shard_rows=500)
    expected = finished(plain, **quick)
    found = finished(spread, "services.retrieval.build_ray", **quick)
    assert found.counts["resumed"] == CHUNK + 300  # all of it was embedded by the cluster
    assert (found.settings, found.made_from, found.rows) == (expected.settings, expected.made_from, expected.rows)
    of_plain, of_cluster = (vector_file.read(folder / "index") for folder in (plain, spread))
    np.testing.assert_allclose(of_cluster, of_plain, atol=0.01)
