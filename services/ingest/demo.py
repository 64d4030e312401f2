"""The shipped demo records: short texts written for this project, so that the loop runs offline with no data given.

They state textbook biomedicine, but they are NOT PubMed records: the journal says so, and their identifiers start at
990000001, above every PMID in use (PMIDs have at most eight digits). `demo_records.jsonl` holds one record a line:
title, mesh_terms, abstract.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from services.ingest.estimate import CORPUS_BYTES, Estimate
from services.ingest.store import Base, Change
from shared.files import hash_file
from shared.progress import Progress
from shared.records import Paper
from shared.settings import Settings

RECORDS = Path(__file__).with_name("demo_records.jsonl")
FIRST_ID = 990_000_001
JOURNAL = "Dr. Zero demo records (not PubMed)"


class DemoRecords:
    """The `demo` source."""

    may_differ: frozenset[str] = frozenset()

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.made_from: Mapping[str, str] = {"demo": hash_file(RECORDS)}
        self.shaped_by: Mapping[str, Any] = {}

    def estimate(self, base: Base) -> Estimate:
        """The demo records cost no time worth telling."""
        papers = len(read_demo())
        return Estimate(papers, 0, 0.0, papers * CORPUS_BYTES, 0)

    def done(self) -> None:
        """Nothing is kept."""

    def goes_on_from(self, base: Base) -> bool:
        """There is nothing to go on from: they are written anew in a moment."""
        return False

    def change(self, base: Base, draft: Path) -> Change:
        """All demo records; every one has an abstract."""
        papers = read_demo()
        pmids = np.array([int(paper.pmid) for paper in papers], np.int64)
        versions = np.ones(len(papers), np.uint8)
        return Change(np.empty(0, bool), pmids, versions, self._shown(papers), Counter(read=len(papers)), None)

    def _shown(self, papers: list[Paper]) -> Iterator[Paper]:
        with Progress("ingest", self.settings, total=len(papers)) as progress:
            for paper in papers:
                progress.advance()
                yield paper


def read_demo(path: Path = RECORDS) -> list[Paper]:
    """The demo records as papers, numbered in the order of the file."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Paper(
            pmid=str(FIRST_ID + number),
            title=record["title"],
            abstract=record["abstract"],
            journal=JOURNAL,
            mesh_terms=tuple(record["mesh_terms"]),
        )
        for number, record in enumerate(records)
    ]
