"""The demo records and the command around them: marked as our own, distinct, linked, used when nothing is set."""

import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from ingest_command import ROOT, command, environment, ingest

from services.ingest.__main__ import chosen_source
from services.ingest.demo import RECORDS, read_demo
from services.ingest.tally import drop, settle
from shared.corpus import Corpus
from shared.files import read_manifest
from shared.settings import IngestSettings

PAPERS = read_demo()


def test_there_are_at_least_300_records_and_none_can_be_taken_for_pubmed() -> None:
    assert len(PAPERS) >= 300
    assert len({paper.pmid for paper in PAPERS}) == len(PAPERS)
    for paper in PAPERS:
        assert int(paper.pmid) > 990_000_000  # PMIDs have at most eight digits
        assert "not PubMed" in paper.journal
        assert paper.doi == ""


def test_every_record_is_a_short_text_of_its_own() -> None:
    assert len({paper.title for paper in PAPERS}) == len(PAPERS)
    openings = Counter(" ".join(paper.abstract.split()[:6]) for paper in PAPERS)
    assert openings.most_common(1)[0][1] == 1
    for paper in PAPERS:
        assert 45 <= len(paper.abstract.split()) <= 90, paper.title
        assert paper.abstract.endswith(".")
        assert paper.title.endswith(".")
        assert 2 <= len(paper.mesh_terms) <= 4
        assert len(paper.contents.splitlines()) == 2


def test_most_records_are_linked_to_another_by_a_name_in_its_text() -> None:
    """Questions of two hops need pairs of records: a rare name of one title that another abstract mentions."""
    words = {p.pmid: set(re.findall(r"[A-Za-z0-9-]{5,}", p.abstract.lower())) for p in PAPERS}
    spread = Counter(word for found in words.values() for word in found)
    linked = 0
    for paper in PAPERS:
        names = {w for w in re.findall(r"[A-Za-z0-9-]{5,}", paper.title.lower()) if 1 <= spread[w] <= 12}
        linked += any(names & found for pmid, found in words.items() if pmid != paper.pmid)
    assert linked > len(PAPERS) / 2


def test_the_shipped_file_is_one_compact_json_object_a_line() -> None:
    for line in RECORDS.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        assert list(record) == ["title", "mesh_terms", "abstract"]
        assert json.dumps(record, ensure_ascii=False, separators=(",", ":")) == line


def test_with_nothing_set_the_command_makes_the_demo_corpus_and_then_reuses_it(tmp_path: Path) -> None:
    done = ingest(environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert list(Corpus(tmp_path / "corpus", verify=True)) == PAPERS
    manifest = read_manifest(tmp_path / "corpus")
    assert manifest.settings["source"] == "demo"
    assert (manifest.counts["read"], manifest.counts["kept"], manifest.rows) == (len(PAPERS),) * 3
    assert "corpus is reused" in ingest(environment(tmp_path)).stderr
    assert "changed settings: shard_rows" in ingest(environment(tmp_path, shard_rows=100)).stderr
    assert len(list((tmp_path / "corpus").glob("shard-*.parquet"))) == -(-len(PAPERS) // 100)


def test_the_source_follows_what_is_set() -> None:
    assert chosen_source(IngestSettings()) == "demo"
    assert chosen_source(IngestSettings(query="x")) == "entrez"
    assert chosen_source(IngestSettings(query="x", xml_dir=Path("y"))) == "xml"
    assert chosen_source(IngestSettings(source="demo", query="x", xml_dir=Path("y"))) == "demo"


def test_help_needs_no_valid_settings(tmp_path: Path) -> None:
    environ = environment(tmp_path) | {"DRZERO_INGEST__NONSENSE": "1"}
    shown = subprocess.run(command("--help"), cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0
    assert "--strict" in shown.stdout
    refused = ingest(environ)
    assert refused.returncode == 2
    assert "DRZERO_INGEST__NONSENSE" in refused.stderr


def test_a_record_without_a_fate_is_our_defect() -> None:
    counts = Counter({"read": 3})
    drop(counts, "no_abstract")
    assert settle(counts, 2) == {"read": 3, "dropped_no_abstract": 1, "kept": 2}
    with pytest.raises(AssertionError, match="read 3"):
        settle(counts, 1)
