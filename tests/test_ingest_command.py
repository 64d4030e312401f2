"""The ingest command's flags: they stand for settings, a dry run touches nothing, an export is the contract's."""

import json
import os
from pathlib import Path

import pytest
from ingest_command import environment, ingest

from services.ingest.__main__ import parse
from services.ingest.estimate import of_files, of_query
from shared.corpus import Corpus
from shared.settings import build_settings

KEYS = {"id", "pmid", "title", "abstract", "authors", "journal", "pub_date", "mesh_terms", "doi", "text", "contents"}


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """`parse` writes into the environment: take that back after each test."""
    for name in ("QUERY", "DATE_FROM", "DATE_TO", "MAX_RECORDS", "XML_DIR", "SOURCE"):
        monkeypatch.setenv(f"DRZERO_INGEST__{name}", "")


def test_flags_stand_for_settings_and_win_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRZERO_INGEST__MAX_RECORDS", "5")
    parse(["--query", "asthma", "--from", "2020-01-01", "--to", "2020-12-31", "--max", "12000"])
    made = build_settings(os.environ).ingest
    assert (made.source, made.query, made.max_records) == ("entrez", "asthma", 12000)
    assert (str(made.date_from), str(made.date_to)) == ("2020-01-01", "2020-12-31")


def test_two_sources_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["--query", "asthma", "--xml-dir", "x"])
    assert "two sources" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--from", "2020-13-01"], ["--max", "0"], ["--max", "many"]])
def test_a_bad_value_is_one_sentence_that_names_the_setting(tmp_path: Path, words: list[str]) -> None:
    done = ingest(environment(tmp_path / "data"), *words)
    assert done.returncode == 2
    assert "DRZERO_INGEST__" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(tmp_path: Path) -> None:
    done = ingest(environment(tmp_path / "data"), "--dry-run")
    assert done.returncode == 0
    assert "dry run" in done.stderr
    assert '"papers": 306' in done.stderr or "papers=306" in done.stderr
    assert not (tmp_path / "data" / "corpus").exists()


def test_the_export_holds_every_paper_with_the_contracts_keys(tmp_path: Path) -> None:
    target = tmp_path / "out" / "papers.jsonl"
    for _ in range(2):  # made, then reused: exported both times
        assert ingest(environment(tmp_path / "data"), "--jsonl", str(target)).returncode == 0
        rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
        assert len(rows) == len(Corpus(tmp_path / "data" / "corpus")) == 306
        assert all(rows[0].keys() >= KEYS for _ in rows)
        assert rows[0]["contents"] == f"{rows[0]['title']}\n{rows[0]['abstract']}"
        assert [path.name for path in target.parent.iterdir()] == ["papers.jsonl"]
        target.unlink()


def test_an_estimate_counts_batches_and_searches() -> None:
    estimate = of_query(20_000, limit=10_000, batch=200, cap=9_999, rate=3)
    assert estimate.papers == 10_000
    assert 50 <= estimate.requests <= 60
    assert estimate.seconds == pytest.approx(estimate.requests / 3)


def test_an_estimate_of_files_grows_with_them_and_shrinks_with_processes() -> None:
    small, large = of_files(10**6, 0, processes=1), of_files(10**8, 10**6, processes=1)
    assert small.papers < large.papers
    assert of_files(10**8, 10**6, processes=4).seconds == pytest.approx(large.seconds / 4)
