"""The quality command: its measures on cases worked out by hand, its tables on a tiny set, and the aim on SciFact."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
import structlog
from corpora import publish_corpus
from retrieval_quality import (
    DATA,
    WAYS,
    Bench,
    Judged,
    ndcg,
    of_each,
    p_value,
    recall,
    reciprocal_rank,
    run_scifact,
    scifact,
    settings_in,
)
from retrieval_world import needs_minilm

from services.retrieval.build import build

has_scifact = pytest.mark.skipif(not (DATA / "scifact").is_dir(), reason="the data beside this checkout is absent")


def test_measures_are_those_of_the_textbook() -> None:
    assert ndcg(["a", "b", "c"], {"a"}) == 1.0
    assert ndcg(["x", "a"], {"a", "b"}) == pytest.approx((1 / np.log2(3)) / (1 + 1 / np.log2(3)))
    assert ndcg(["x"] * 10 + ["a"], {"a"}) == 0.0
    assert ndcg([], {"a"}) == 0.0
    assert recall(["a", "x", "b"], {"a", "b", "c"}, at=2) == pytest.approx(1 / 3)
    assert [reciprocal_rank(found, {"a"}) for found in (["a"], ["x", "a"], ["x"], [])] == [1.0, 0.5, 0.0, 0.0]
    assert of_each(ndcg, [["a"], ["x"]], Judged(["1", "2"], [{"a"}, {"b"}])).tolist() == [1.0, 0.0]


def test_a_difference_is_significant_when_it_is_everywhere_and_not_when_it_is_noise() -> None:
    noise = np.random.default_rng(1).normal(size=200)
    assert p_value(noise + 0.5, np.zeros(200)) < 0.001
    assert p_value(noise - noise.mean() + 0.02, np.zeros(200)) > 0.1
    assert p_value(noise, noise) == 1.0


def tiny_scifact(folder: Path) -> Path:
    abstracts = [("7", "Gout", "['Lithium is no cure.'\n 'Gout hurts.']"), ("8", "Sepsis", "[\"It's bad.\" 'Very.']")]
    claims = [("1", "Gout hurts.", "[7]"), ("1", "Gout hurts.", "[7]"), ("2", "Sepsis is bad.", "[8, 7]")]
    write(folder / "corpus.csv.gz", ["doc_id", "title", "abstract"], abstracts)
    write(folder / "claims_train.csv.gz", ["id", "claim", "cited_doc_ids"], claims)
    return folder


def write(path: Path, names: list[str], rows: list[tuple[str, str, str]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([names, *rows])


def test_scifact_is_read_with_one_claim_for_many_rows(tmp_path: Path) -> None:
    papers, judged = scifact(tiny_scifact(tmp_path))
    assert [paper.abstract for paper in papers] == ["Lithium is no cure. Gout hurts.", "It's bad. Very."]
    assert judged == Judged(["Gout hurts.", "Sepsis is bad."], [{"7"}, {"7", "8"}])


@needs_minilm
def test_the_command_prints_a_row_for_each_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_scifact(tiny_scifact(tmp_path), tmp_path / "work", WAYS)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:6]] == [way.name for way in WAYS]
    assert all(len(line.split("|")) == len(lines[0].split("|")) for line in lines[:6])


@pytest.mark.slow
@has_scifact
@needs_minilm
def test_hybrid_beats_the_better_search_on_scifact(tmp_path: Path) -> None:
    papers, judged = scifact(DATA / "scifact")
    publish_corpus(tmp_path, papers, shard_rows=10_000)
    settings = settings_in(tmp_path)
    build(settings, structlog.get_logger())
    bench = Bench(settings, judged)
    dense, words, hybrid = (of_each(ndcg, bench.find(way), judged) for way in WAYS[:3])
    better = max(dense, words, key=lambda values: float(values.mean()))
    assert hybrid.mean() - better.mean() >= 0.02
    assert p_value(hybrid, better) < 0.01
