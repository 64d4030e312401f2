"""The ledger of a corpus: of every PMID that stands, its version, its fate and its row.

Writer: services.ingest, which goes on from it when new files or papers come. Reader: `Corpus.find`. Four columns as
`ledger-<column>.npy`, sorted by PMID, so that 37 million PMIDs are 0.5 GB that is mapped, not loaded.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_ROW = -1


@dataclass(frozen=True)
class Ledger:
    """Columns of shape [n], sorted by PMID, each PMID once."""

    pmids: NDArray[np.int64]
    versions: NDArray[np.uint8]
    fates: NDArray[np.uint8]  # what became of the record, in a numbering of the writer's
    rows: NDArray[np.int32]  # row in the shards, dead rows counted too; NO_ROW for a paper that is not kept

    @classmethod
    def empty(cls) -> "Ledger":
        """No PMIDs."""
        return cls(np.empty(0, np.int64), np.empty(0, np.uint8), np.empty(0, np.uint8), np.empty(0, np.int32))

    @classmethod
    def read(cls, folder: Path) -> "Ledger":
        """The ledger of a corpus, memory-mapped."""
        return cls(*(np.load(folder / _file(column.name), mmap_mode="r") for column in fields(cls)))

    def write(self, folder: Path) -> None:
        """Write the columns into a folder."""
        for column in fields(self):
            np.save(folder / _file(column.name), getattr(self, column.name))

    def __len__(self) -> int:
        return len(self.pmids)

    def __contains__(self, pmid: object) -> bool:
        return isinstance(pmid, int) and self.place(pmid) is not None

    def place(self, pmid: int) -> int | None:
        """The index of a PMID in the columns, or None."""
        at = int(np.searchsorted(self.pmids, pmid))
        return at if at < len(self) and self.pmids[at] == pmid else None

    def places(self, pmids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The index of each PMID in the columns, shape [m]; -1 for one that is not there."""
        if not len(self):
            return np.full(len(pmids), -1, np.int64)
        at = np.minimum(np.searchsorted(self.pmids, pmids), len(self) - 1)
        return np.where(self.pmids[at] == pmids, at, -1)

    def only(self, chosen: NDArray[Any]) -> "Ledger":
        """The entries of a mask or of indices in ascending order."""
        return Ledger(self.pmids[chosen], self.versions[chosen], self.fates[chosen], self.rows[chosen])

    def joined(self, other: "Ledger") -> "Ledger":
        """Both together; no PMID may be in both."""
        mine, theirs = ([getattr(one, column.name) for column in fields(self)] for one in (self, other))
        both = [np.concatenate(pair) for pair in zip(mine, theirs, strict=True)]
        order = np.argsort(both[0], kind="stable")
        return Ledger(*(column[order] for column in both))


def _file(column: str) -> str:
    return f"ledger-{column}.npy"
