"""Building and opening an index: reuse, what makes it stale, refusals, a killed build."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import structlog
from corpora import publish_corpus
from hypothesis import given
from hypothesis import strategies as st
from retrieval_world import PAPERS, environment, needs_minilm, settings_for

from services.retrieval.build import build
from services.retrieval.index import FlatIndex
from services.retrieval.known import KnownVectors, digests
from services.retrieval.search import Searcher
from shared.files import ArtifactError, read_manifest

pytestmark = needs_minilm

LOG: structlog.stdlib.BoundLogger = structlog.get_logger()


def command(folder: Path, **more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "services.retrieval.build"],
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
    build(settings_for(tmp_path), LOG)
    changed = [PAPERS[-1], *PAPERS[1:], replace(PAPERS[0], title="Another title altogether")]
    publish_corpus(tmp_path, changed)
    build(settings_for(tmp_path), LOG)
    counts = read_manifest(tmp_path / "index").counts
    # New are the last two papers, one of them twice, and the changed title.
    assert (counts["embedded"], counts["reused"]) == (4, len(changed) - 4)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    publish_corpus(fresh, changed)
    build(settings_for(fresh), LOG)
    everything = np.arange(len(changed))
    mixed, made = (FlatIndex.read(folder / "index").vectors(everything) for folder in (tmp_path, fresh))
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
    process = command(tmp_path, **changed)
    while not (tmp_path / ".index.building").exists():
        assert process.poll() is None, "the build ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert (tmp_path / ".index.building").exists()
    assert read_manifest(tmp_path / "index", verify=True) == old
    assert Searcher(settings).search([PAPERS[5].text], 1)[0][0].paper == PAPERS[5]
    assert build(settings_for(tmp_path, **changed), LOG)
    assert not (tmp_path / ".index.building").exists()
