"""The files of a corpus: what a corpus of before holds, and what a source changes of it.

In: `Base`, the corpus to go on from (an empty one for a run from nothing), and `Change`, what the source brings. Out:
shards, ledger, dead rows and counts in a draft. Full shards of the base are linked, not copied; its last one, when it
is not full, is written again with the new papers behind. When more than `MOST_DEAD` of all rows are dead, everything
is written anew without them. The papers, their order and counts are those of a run from nothing over all input.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.ingest.filters import FATES, KEPT, Rules, fate
from services.ingest.tally import drop, settle
from shared.corpus import Shards, shard_file, write_books, write_shards
from shared.files import Draft, Manifest
from shared.ledger import NO_ROW, Ledger
from shared.records import Paper

ORIGIN = "origin.json"
MOST_DEAD = 0.2


@dataclass(frozen=True)
class Base:
    """The corpus that a run goes on from; `origin` is what its source noted for this run."""

    folder: Path | None = None
    identity: str = "nothing"
    ledger: Ledger = field(default_factory=Ledger.empty)
    counts: Mapping[str, int] = field(default_factory=dict)
    origin: Any = None

    @classmethod
    def read(cls, folder: Path, manifest: Manifest) -> "Base":
        """The published corpus of this manifest."""
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        return cls(folder.resolve(), manifest.identity, Ledger.read(folder), manifest.counts, origin)


@dataclass(frozen=True)
class Change:
    """What a source brings: which entries of the base's ledger stay, and papers of which the rules keep some.

    `counts` are those of the whole corpus as far as a source knows them: all but the fates of the papers that stand.
    """

    remains: NDArray[np.bool_]  # shape [n], of the base's ledger
    pmids: NDArray[np.int64]  # shape [m], those of `papers` in their order; none of them remains
    versions: NDArray[np.uint8]  # shape [m]
    papers: Iterator[Paper]
    counts: Counter[str]
    origin: Any  # JSON-ready

    @property
    def is_nothing(self) -> bool:
        """Whether the corpus would be the one of before."""
        return bool(self.remains.all()) and not len(self.pmids)


@dataclass(frozen=True)
class _Carried:
    """What is left of the base: its ledger, the full shards that are linked, and the papers to write behind them."""

    ledger: Ledger
    shards: int
    papers: Iterable[Paper]
    rows: int  # of the shards and the papers together


def write(change: Change, base: Base, draft: Draft, *, rules: Rules, shard_rows: int) -> None:
    """Fill the draft of a corpus, and set its rows and counts."""
    carried = _carried(base, change.remains, draft.path, shard_rows)
    fates, rows = np.zeros(len(change.pmids), np.uint8), np.full(len(change.pmids), NO_ROW, np.int32)

    def kept() -> Iterator[Paper]:
        row = carried.rows
        for place, (pmid, paper) in enumerate(zip(change.pmids.tolist(), change.papers, strict=True)):
            if int(paper.pmid) != pmid:
                raise AssertionError(f"the source announced PMID {pmid} and brought {paper.pmid}")
            name = fate(paper, rules)
            fates[place] = FATES.index(name)
            if name in KEPT:
                rows[place] = row
                row += 1
                yield paper

    written = write_shards(chain(carried.papers, kept()), draft.path, shard_rows, first=carried.shards)
    ledger = carried.ledger.joined(Ledger(change.pmids, change.versions, fates, rows))
    write_books(draft.path, ledger, carried.shards * shard_rows + written)
    (draft.path / ORIGIN).write_text(json.dumps(change.origin) + "\n", encoding="utf-8")
    draft.rows = int((ledger.rows != NO_ROW).sum())
    draft.counts = counted(change.counts, ledger)


def counted(counts: Counter[str], ledger: Ledger) -> dict[str, int]:
    """The counts of a source with the fates of all that stands, for the manifest."""
    found = np.bincount(ledger.fates, minlength=len(FATES)).tolist()
    told = Counter(counts)
    for name, number in zip(FATES, found, strict=True):
        if name not in KEPT and number:
            drop(told, name, number)
    if number := found[FATES.index("language_unknown")]:
        told["language_unknown"] = number
    return settle(told, sum(number for name, number in zip(FATES, found, strict=True) if name in KEPT))


def _carried(base: Base, remains: NDArray[np.bool_], folder: Path, shard_rows: int) -> _Carried:
    ledger = base.ledger.only(remains)
    if base.folder is None:
        return _Carried(ledger, 0, (), 0)
    old = Shards(base.folder)
    alive = np.zeros(len(old), bool)
    alive[ledger.rows[ledger.rows != NO_ROW]] = True
    if np.count_nonzero(~alive) > MOST_DEAD * len(old):
        ranks = (np.cumsum(alive) - 1).astype(np.int32)
        rows = np.where(ledger.rows == NO_ROW, NO_ROW, ranks[ledger.rows])
        papers = (paper for paper, lives in zip(old.papers(), alive, strict=True) if lives)
        return _Carried(replace(ledger, rows=rows), 0, papers, int(alive.sum()))
    full = len(old) // shard_rows
    for shard in range(full):
        _link(shard_file(base.folder, shard), shard_file(folder, shard))
    return _Carried(ledger, full, old.papers(full), len(old))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
