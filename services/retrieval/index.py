"""The vector index: FAISS, exact inner product. The only file that imports faiss.

Row i of the index is row i of the corpus. A result never holds FAISS's -1 ("no such row"): when k is larger than the
index, the whole index is the answer. Reading maps the file into memory, so replicas share its pages.
Not thread-safe; FAISS's threads are those of the thread that made the object.
"""

import logging
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from services.retrieval.encoder import Vectors
from shared.files import ArtifactError

FILE = "vectors.faiss"

Rows = list[tuple[float, int]]  # (score, row), best first


class FlatIndex:
    """All vectors as they are; exact search."""

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def empty(cls, dim: int) -> Self:
        """An index without vectors."""
        return cls(_faiss().IndexFlatIP(dim))

    @classmethod
    def read(cls, folder: Path, *, threads: int = 0) -> Self:
        """The index of a published artifact, memory-mapped; `threads` 0 lets OpenMP decide."""
        faiss = _faiss()
        if threads:
            faiss.omp_set_num_threads(threads)
        path = folder / FILE
        try:
            return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY))
        except RuntimeError as error:  # FAISS says C++ source lines, which help nobody
            raise ArtifactError(f"{path} is no index that FAISS can read; delete {folder} and make it again") from error

    def write(self, folder: Path) -> None:
        """Write the index into an artifact's building folder."""
        _faiss().write_index(self._index, str(folder / FILE))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self._index.d)

    @property
    def bytes_by_place(self) -> dict[str, int]:
        """Memory that a search reads: all vectors in float32, on the CPU."""
        return {"cpu": len(self) * self.dim * 4}

    def add(self, vectors: Vectors) -> None:
        """Append vectors, shape [n, dim]."""
        self._index.add(np.ascontiguousarray(vectors))

    def vectors(self, rows: NDArray[np.int64]) -> Vectors:
        """The vectors of some rows, shape [n, dim]."""
        found: Vectors = self._index.reconstruct_batch(np.ascontiguousarray(rows))
        return found

    def search(self, vectors: Vectors, top_k: int) -> list[Rows]:
        """The best min(top_k, len) rows of each vector, best first."""
        if not len(vectors) or not len(self):
            return [[] for _ in range(len(vectors))]
        return hits(*self._index.search(np.ascontiguousarray(vectors), min(top_k, len(self))))


def hits(scores: Vectors, rows: NDArray[np.int64]) -> list[Rows]:
    """Scores and rows of each query, shape [n, k], as lists without FAISS's -1."""
    return [
        [(score, row) for score, row in zip(*pair, strict=True) if row >= 0]
        for pair in zip(scores.tolist(), rows.tolist(), strict=True)
    ]


def _faiss() -> Any:
    # Its loader logs every instruction set that it does not find.
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    import faiss

    return faiss
