"""The corpus artifact: zstd-compressed Parquet shards of papers, read by row without loading them all.

Writer: services.ingest. Readers: the index builder (in order), the search service (by row or PMID), the seeds.
Row i of the corpus is row i of the index; rows are ordered by the order of ingest.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.files import Manifest, read_manifest
from shared.records import Paper

ROWS_PER_GROUP = 256  # a random row costs the decoding of one group, about a millisecond
CACHED_GROUPS = 64

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


def write_shards(papers: Iterable[Paper], folder: Path, shard_rows: int) -> int:
    """Write papers as `shard-00000.parquet`, … and return how many there were."""
    total = 0
    batch: list[Paper] = []

    def flush() -> None:
        columns = {name: [_plain(getattr(p, name)) for p in batch] for name in SCHEMA.names}
        table = pa.table(columns, schema=SCHEMA)
        path = folder / f"shard-{total // shard_rows:05d}.parquet"
        pq.write_table(table, path, compression="zstd", row_group_size=ROWS_PER_GROUP)

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
        self._files = [pq.ParquetFile(p, memory_map=True) for p in sorted(self.path.glob("shard-*.parquet"))]
        self._groups: list[tuple[int, int, int]] = []  # (first row, file, row group)
        row = 0
        for number, file in enumerate(self._files):
            for group in range(file.metadata.num_row_groups):
                self._groups.append((row, number, group))
                row += file.metadata.row_group(group).num_rows
        self._rows = row
        self._cache: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        self._row_of: dict[str, int] | None = None

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[Paper]:
        for file in self._files:
            for batch in file.iter_batches(batch_size=ROWS_PER_GROUP):
                yield from (_paper(record) for record in batch.to_pylist())

    def __getitem__(self, row: int) -> Paper:
        """The paper of a row; IndexError outside 0 … len-1 (FAISS's -1 for "no result" included)."""
        if not 0 <= row < self._rows:
            raise IndexError(f"row {row} is not in the corpus of {self._rows} papers")
        index = self._group_of(row)
        return _paper(self._load(index)[row - self._groups[index][0]])

    def find(self, pmid: str) -> Paper | None:
        """The paper with this PMID, or None."""
        if self._row_of is None:
            pmids = (p for file in self._files for p in file.read(columns=["pmid"])["pmid"].to_pylist())
            self._row_of = {pmid: row for row, pmid in enumerate(pmids)}
        row = self._row_of.get(pmid)
        return None if row is None else self[row]

    def _group_of(self, row: int) -> int:
        low, high = 0, len(self._groups) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._groups[middle][0] <= row:
                low = middle
            else:
                high = middle - 1
        return low

    def _load(self, index: int) -> list[dict[str, Any]]:
        if index not in self._cache:
            _, number, group = self._groups[index]
            self._cache[index] = self._files[number].read_row_group(group).to_pylist()
            if len(self._cache) > CACHED_GROUPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(index)
        return self._cache[index]


def _paper(record: dict[str, Any]) -> Paper:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    return Paper(**fields)
