"""Corpora of given papers, for tests of what reads them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from services.ingest.filters import Rules
from services.ingest.store import Base, Change, write
from shared.files import publish
from shared.records import Paper
from shared.settings import IngestSettings


def publish_corpus(folder: Path, papers: Sequence[Paper], shard_rows: int = 50) -> None:
    """A corpus of all these papers at `folder`/corpus."""
    rules = Rules.of(IngestSettings(require_abstract=False, keep_retracted=True))
    pmids = np.array([int(paper.pmid) for paper in papers], np.int64)
    versions = np.ones(len(papers), np.uint8)
    change = Change(np.empty(0, bool), pmids, versions, iter(papers), Counter(read=len(papers)), None)
    with publish(folder / "corpus", settings={}, made_from={"test": "papers"}) as draft:
        write(change, Base(), draft, rules=rules, shard_rows=shard_rows)
