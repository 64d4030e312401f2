"""The corpus artifact: zstd-compressed Parquet shards of papers, read by row without loading them all.

Writer: services.ingest. Readers: the index builder (in order), the search service (by row or PMID), the seeds.
Row i of the corpus is row i of the index; rows are ordered by the order of ingest. Shards never change: a later run
adds shards, and names the rows whose papers have been replaced or withdrawn in `dead.npy`. Readers do not see those:
rows are counted without them.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.files import Manifest, read_manifest
from shared.ledger import NO_ROW, Ledger
from shared.pmids import number
from shared.records import Paper

ROWS_PER_GROUP = 256  # a random row costs the reading of one group, two milliseconds, unless it is kept
CACHED_BYTES = 256 * 1024**2  # of groups as Arrow holds them, about 1.8 kB a paper
DEAD = "dead.npy"

SCHEMA = pa.schema(
    [
        ("pmid", pa.string()),
        ("title", pa.string()),
        ("abstract", pa.string()),
        ("authors", pa.list_(pa.string())),
        ("journal", pa.string()),
        ("pub_date", pa.string()),
        ("mesh_terms", pa.list_(pa.string())),
        ("doi", pa.string()),
        ("vernacular_title", pa.string()),
        ("journal_abbreviation", pa.string()),
        ("issn", pa.string()),
        ("pub_date_text", pa.string()),
        ("pmc", pa.string()),
        ("languages", pa.list_(pa.string())),
        ("publication_types", pa.list_(pa.string())),
        ("keywords", pa.list_(pa.string())),
        ("mesh_headings", pa.list_(pa.string())),
        ("links", pa.list_(pa.string())),
        ("retracted", pa.bool_()),
    ]
)


def write_shards(papers: Iterable[Paper], folder: Path, shard_rows: int, *, first: int = 0) -> int:
    """Write papers as `shard-00000.parquet`, …, counted from shard `first`; returns how many there were."""
    total = 0
    batch: list[Paper] = []

    def flush() -> None:
        columns = {name: [_plain(getattr(p, name)) for p in batch] for name in SCHEMA.names}
        table = pa.table(columns, schema=SCHEMA)
        pq.write_table(
            table, shard_file(folder, first + total // shard_rows), compression="zstd", row_group_size=ROWS_PER_GROUP
        )

    for paper in papers:
        batch.append(paper)
        if len(batch) == shard_rows:
            flush()
            total += len(batch)
            batch.clear()
    if batch:
        flush()
        total += len(batch)
    return total


def write_books(folder: Path, ledger: Ledger, rows: int) -> None:
    """Write the ledger of shards with so many rows, and which of them are dead: those that no entry names."""
    ledger.write(folder)
    alive = np.zeros(rows, bool)
    alive[ledger.rows[ledger.rows != NO_ROW]] = True
    np.save(folder / DEAD, np.flatnonzero(~alive))


def shard_file(folder: Path, shard: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{shard:05d}.parquet"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class Corpus:
    """Random and sequential access to a published corpus. Not thread-safe.

    Raises shared.files.ArtifactError when the artifact is missing or damaged.
    """

    def __init__(self, path: Path, *, verify: bool = False) -> None:
        # The link is resolved once, so that a new version published later does not mix into this reader.
        self.path = path.resolve()
        self.manifest: Manifest = read_manifest(self.path, verify=verify)
        self.ledger = Ledger.read(self.path)
        self.shards = Shards(self.path)
        dead = np.load(self.path / DEAD)
        self._dead = dead
        self._before = dead - np.arange(len(dead))  # how many living rows lie before each dead one

    def __len__(self) -> int:
        return len(self.shards) - len(self._dead)

    def __iter__(self) -> Iterator[Paper]:
        dead = iter([*self._dead.tolist(), NO_ROW])
        skipped = next(dead)
        for row, paper in enumerate(self.shards.papers()):
            if row == skipped:
                skipped = next(dead)
            else:
                yield paper

    def __getitem__(self, row: int) -> Paper:
        """The paper of a row; IndexError outside 0 … len-1 (FAISS's -1 for "no result" included)."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in the corpus of {len(self)} papers")
        return self.shards[row + int(np.searchsorted(self._before, row, side="right"))]

    def find(self, pmid: str) -> Paper | None:
        """The paper with this PMID, or None."""
        place = self.ledger.place(number(pmid))
        if place is None or self.ledger.rows[place] == NO_ROW:
            return None
        return self.shards[int(self.ledger.rows[place])]


class Shards:
    """The papers of all shards in a folder, those of dead rows included. Not thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._files = [pq.ParquetFile(p, memory_map=True) for p in sorted(folder.glob("shard-*.parquet"))]
        self._groups: list[tuple[int, int, int]] = []  # (first row, file, row group)
        row = 0
        for file_number, file in enumerate(self._files):
            for group in range(file.metadata.num_row_groups):
                self._groups.append((row, file_number, group))
                row += file.metadata.row_group(group).num_rows
        self._rows = row
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._cached_bytes = 0

    def __len__(self) -> int:
        return self._rows

    def papers(self, first: int = 0) -> Iterator[Paper]:
        """All papers in order, from shard `first` on."""
        for file in self._files[first:]:
            for batch in file.iter_batches(batch_size=ROWS_PER_GROUP):
                yield from (_paper(record) for record in batch.to_pylist())

    def __getitem__(self, row: int) -> Paper:
        """The paper of a row of 0 … len-1."""
        index = bisect_right(self._groups, row, key=itemgetter(0)) - 1
        (record,) = self._load(index).slice(row - self._groups[index][0], 1).to_pylist()
        return _paper(record)

    def _load(self, index: int) -> pa.Table:
        if index not in self._cache:
            _, file_number, group = self._groups[index]
            table = self._cache[index] = self._files[file_number].read_row_group(group)
            self._cached_bytes += table.nbytes
            while self._cached_bytes > CACHED_BYTES and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        self._cache.move_to_end(index)
        return self._cache[index]


def _paper(record: dict[str, Any]) -> Paper:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    return Paper(**fields)
