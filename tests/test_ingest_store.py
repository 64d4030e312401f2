"""A corpus that is added to: the same as one made in one run, only what is new is read, shards are shared, no scars."""

import errno
import os
import random
import resource
import subprocess
from pathlib import Path

import numpy as np
import pytest
from corpora import publish_corpus
from eutils_server import article, article_set
from ingest_command import ROOT, command, environment, ingest

from shared.corpus import Corpus, write_books
from shared.files import read_manifest
from shared.records import Paper

PMIDS = range(1, 13)
UPDATES = Path(__file__).parents[2] / "shared" / "data" / "pubmed-updates"
BASELINE = Path(__file__).parents[2] / "shared" / "data" / "pubmed" / "full-xml"
needs_data = pytest.mark.skipif(not BASELINE.is_dir(), reason="the real PubMed files are not beside this checkout")


def update_file(draw: random.Random, number: int) -> str:
    """An update file: new papers, revisions, some of higher versions, papers without abstract, and deletions."""
    records = []
    for pmid in draw.sample(PMIDS, 6):
        text = article(pmid, abstract=draw.random() < 0.8, title=f"Title of {pmid} in {number}.")
        records.append(text.replace('Version="1"', f'Version="{draw.choice([1, 1, 1, 2])}"'))
    gone = "".join(f'<PMID Version="1">{pmid}</PMID>' for pmid in draw.sample(PMIDS, 2))
    return f"<PubmedArticleSet>{''.join(records)}<DeleteCitation>{gone}</DeleteCitation></PubmedArticleSet>"


def told(data: Path) -> tuple[list[Paper], dict[str, int]]:
    corpus = Corpus(data / "corpus", verify=True)
    papers = list(corpus)
    assert papers == [corpus[row] for row in range(len(corpus))]
    assert all(corpus.find(paper.pmid) == paper for paper in papers)
    held = {int(paper.pmid) for paper in papers}
    assert all(corpus.find(str(pmid)) is None for pmid in PMIDS if pmid not in held)
    assert len(held) == len(papers) == corpus.manifest.rows
    return papers, dict(corpus.manifest.counts)


@pytest.mark.parametrize("seed", range(4))
def test_files_that_come_in_turn_make_the_corpus_of_one_run(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)  # noqa: S311
    source = tmp_path / "xml"
    source.mkdir()
    stepwise = environment(tmp_path / "stepwise", xml_dir=source, shard_rows=3)
    for number in range(5):
        (source / f"n{number}.xml").write_text(update_file(draw, number))
        if number == 2:
            (source / "n2b.xml").write_text("<PubmedArticleSet><cut")
        done = ingest(stepwise)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("file is scanned") == 1
    assert ingest(environment(tmp_path / "at_once", xml_dir=source, shard_rows=3)).returncode == 0
    assert told(tmp_path / "stepwise") == told(tmp_path / "at_once")
    assert (tmp_path / "stepwise" / "corpus" / "malformed.json").exists()


def test_full_shards_are_shared_and_the_last_one_is_filled(tmp_path: Path) -> None:
    source = tmp_path / "xml"
    source.mkdir()
    environ = environment(tmp_path / "data", xml_dir=source, shard_rows=4)
    (source / "n1.xml").write_bytes(article_set(range(1, 11)))
    assert ingest(environ).returncode == 0
    corpus = (tmp_path / "data" / "corpus").resolve()
    first = {path.name: path.stat().st_ino for path in corpus.glob("shard-*")}
    (source / "n2.xml").write_bytes(article_set([3, 11, 12]))
    assert ingest(environ).returncode == 0
    corpus = (tmp_path / "data" / "corpus").resolve()
    second = {path.name: path.stat().st_ino for path in corpus.glob("shard-*")}
    shared = {name for name in first if first[name] == second[name]}
    assert shared == {"shard-00000.parquet", "shard-00001.parquet"}
    assert len(second) == 4
    assert [int(paper.pmid) for paper in Corpus(corpus)] == [1, 2, *range(4, 11), 3, 11, 12]


def test_many_dead_rows_are_swept_out(tmp_path: Path) -> None:
    source = tmp_path / "xml"
    source.mkdir()
    environ = environment(tmp_path / "data", xml_dir=source, shard_rows=4)
    shards = []
    for number, pmids in enumerate(([*range(1, 11)], [1, 2], [3, 4, 5])):
        (source / f"n{number}.xml").write_bytes(article_set(pmids))
        assert ingest(environ).returncode == 0
        corpus = Corpus(tmp_path / "data" / "corpus", verify=True)
        shards.append((len(corpus.shards), len(corpus)))
    assert shards == [(10, 10), (12, 10), (10, 10)]  # the third run would have left 5 of 15 dead
    assert [int(paper.pmid) for paper in corpus] == [6, 7, 8, 9, 10, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("change", ["exchanged", "removed", "before"])
def test_files_that_are_not_only_new_ones_behind_are_all_read_again(change: str, tmp_path: Path) -> None:
    source = tmp_path / "xml"
    source.mkdir()
    for number in (1, 2):
        (source / f"n{number}.xml").write_bytes(article_set([number]))
    environ = environment(tmp_path / "data", xml_dir=source)
    assert ingest(environ).returncode == 0
    if change == "removed":
        (source / "n1.xml").unlink()
    else:
        (source / ("n1.xml" if change == "exchanged" else "n0.xml")).write_bytes(article_set([7]))
    done = ingest(environ)
    assert done.stderr.count("file is scanned") == len(list(source.iterdir()))
    assert {paper.pmid for paper in Corpus(tmp_path / "data" / "corpus")} == {
        "exchanged": {"7", "2"}, "removed": {"2"}, "before": {"1", "2", "7"},
    }[change]  # fmt: skip


def test_strict_reads_again_what_was_left_out_as_malformed(tmp_path: Path) -> None:
    source = tmp_path / "xml"
    source.mkdir()
    (source / "n1.xml").write_bytes(article_set([1]))
    (source / "n2.xml").write_text("<PubmedArticleSet>")
    environ = environment(tmp_path / "data", xml_dir=source)
    assert ingest(environ).returncode == 0
    (source / "n3.xml").write_bytes(article_set([3]))
    done = ingest(environ, "--strict")
    assert done.returncode == 1
    assert "n2.xml is not readable PubMed XML" in done.stderr.splitlines()[-1]
    assert len(Corpus(tmp_path / "data" / "corpus")) == 1


def limited(environ: dict[str, str], *, file_bytes: int) -> subprocess.CompletedProcess[str]:
    """The command where no file can grow beyond this, as on a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.run(
        command(), cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, preexec_fn=limit
    )


def test_a_full_disk_is_one_sentence_and_the_corpus_stays_as_it_was(tmp_path: Path) -> None:
    source = tmp_path / "xml"
    source.mkdir()
    (source / "n1.xml").write_bytes(article_set([1]))
    environ = environment(tmp_path / "data", xml_dir=source)
    assert ingest(environ).returncode == 0
    (source / "n2.xml").write_bytes(article_set(range(2, 3_000)))
    done = limited(environ, file_bytes=8_000)
    assert done.returncode == 1, done.stderr
    assert os.strerror(errno.EFBIG) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert [paper.pmid for paper in Corpus(tmp_path / "data" / "corpus", verify=True)] == ["1"]
    assert not list((tmp_path / "data").glob(".corpus.building"))
    assert ingest(environ).returncode == 0
    assert len(Corpus(tmp_path / "data" / "corpus")) == 2_999


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="no /sys, in which even root makes no folder")
def test_a_read_only_folder_is_one_sentence() -> None:
    done = ingest(environment(Path("/sys/kernel/drzero")))
    assert done.returncode == 1
    assert "/sys/kernel/drzero" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_data_folder_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    done = ingest(environment(tmp_path / "data"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "data") in done.stderr.splitlines()[-1]


@needs_data
def test_real_updates_that_come_in_turn_make_the_corpus_of_one_run(tmp_path: Path) -> None:
    source = tmp_path / "xml"
    source.mkdir()
    stepwise = environment(tmp_path / "stepwise", xml_dir=source)
    for number, path in enumerate([*sorted(BASELINE.glob("*.gz"))[:2], *sorted(UPDATES.glob("*.gz"))]):
        (source / f"{number:03d}_{path.name}").symlink_to(path)
        assert ingest(stepwise).returncode == 0
    assert ingest(environment(tmp_path / "at_once", xml_dir=source)).returncode == 0
    assert told(tmp_path / "stepwise") == told(tmp_path / "at_once")
    assert read_manifest(tmp_path / "stepwise" / "corpus").counts["deletions"] > 0


@pytest.mark.parametrize(
    ("number", "dead", "shard_rows"),
    [(1, {0}, 1), (9, set(), 4), (9, {0}, 4), (9, {8}, 4), (9, {0, 1, 2, 4}, 3), (40, {0, 7, 8, 9, 20, 38, 39}, 9)],
)
def test_rows_are_counted_without_the_dead_ones(number: int, dead: set[int], shard_rows: int, tmp_path: Path) -> None:
    folder = tmp_path
    publish_corpus(folder, [Paper(str(pmid), "T", "A") for pmid in range(1, number + 1)], shard_rows)
    corpus = (folder / "corpus").resolve()
    alive = np.array([row not in dead for row in range(number)])
    write_books(corpus, Corpus(corpus).ledger.only(alive), number)
    living = [str(row + 1) for row in range(number) if row not in dead]
    found = Corpus(corpus)
    assert [paper.pmid for paper in found] == [found[row].pmid for row in range(len(found))] == living
