"""Forms of index that find most of the nearest vectors in less time or memory: FAISS. The only file that imports it.

    hnsw     graph of neighbours over vectors of one byte a number
    ivf_sq   lists around centres, vectors of one byte a number
    ivf_pq   lists around centres, vectors of `pq_bytes` each

All of them name candidates, whose exact scores are made from the stored vectors, so that short codes cost little recall
once there are enough candidates. A filter is given to FAISS, which then looks at more neighbours or lists, in inverse
proportion to the share of rows that is allowed. Reading maps the file into memory. Not thread-safe; FAISS's threads
are those of the thread that made the object.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from services.retrieval.nearest import Found, Mask, Masks, Vectors, by_mask
from shared.files import ArtifactError
from shared.settings import IndexSettings

Kind = Literal["hnsw", "ivf_sq", "ivf_pq"]

FACTOR: dict[Kind, int] = {"hnsw": 2, "ivf_sq": 2, "ivf_pq": 10}  # candidates for each row wanted, by the code's length
EF_CONSTRUCTION = 100  # twice as long to build as 40, and the neighbours missed are half as many
# A filter for one subject and a query about another: the graph must be walked far. Recall@10 is then 0.83 without this
# factor and 0.97 with it (MiniLM's vectors, a fifth of them allowed); lists have 0.93.
FILTERED_FACTOR = 4
LISTS_PER_ROOT = 4
CENTRES = 256  # of each part of a vector in ivf_pq; each is learnt from one vector at least
TRAIN_PER_LIST = 64  # vectors from which a centre is learnt
TRAIN_ROUNDS = 8
TRAIN_ROWS = 65_536  # vectors from which the range of each number is learnt
ROWS_AT_ONCE = 65_536
FEW, FEW_SHARE, FEW_MOST = 1024, 16, 50_000  # gathering rows costs as much as a search with so much more effort
FAISS_THRESHOLD = 20  # its own


class FaissIndex:
    """A finder that may miss rows."""

    slack = None

    def __init__(self, index: Any, kind: Kind, settings: IndexSettings) -> None:
        self._index = index
        self._kind: Kind = kind
        self._settings = settings
        self._bytes = 0
        self.few = min(FEW_MOST, max(FEW, index.ntotal // FEW_SHARE))

    @classmethod
    def read(cls, folder: Path, kind: Kind, settings: IndexSettings, *, threads: int) -> "FaissIndex":
        """The index of a published artifact; ArtifactError when the file is missing or damaged."""
        faiss = _faiss()
        faiss.omp_set_num_threads(threads)
        # Above this number of queries FAISS multiplies matrices, which may choose other lists than for one alone.
        faiss.cvar.distance_compute_blas_threshold = 1 << 30
        path = folder / file_of(kind)
        try:
            made = cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY), kind, settings)
        except RuntimeError as error:  # FAISS says C++ source lines, which help nobody
            raise ArtifactError(f"{path} is no index that FAISS can read; delete {folder} and make it again") from error
        made._bytes = path.stat().st_size
        return made

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def bytes_by_place(self) -> dict[str, int]:
        """Memory that a search reads: the whole file, on the CPU."""
        return {"cpu": self._bytes}

    def candidates(self, top_k: int) -> int:
        """Several times as many as wanted."""
        return top_k * FACTOR[self._kind]

    def nearest(self, vectors: Vectors, count: int, masks: Masks) -> Found:
        """The rows that FAISS finds, by scores of the short codes."""
        found = Found(
            np.full((len(vectors), count), -np.inf, dtype=np.float32), np.full((len(vectors), count), -1, np.int64)
        )
        for mask, places in by_mask(masks):
            scores, rows = self._index.search(vectors[places], count, params=self._parameters(mask, count))
            found.scores[places] = np.where(rows < 0, -np.inf, scores)
            found.rows[places] = rows
        return found

    def _parameters(self, mask: Mask | None, count: int) -> Any:
        faiss = _faiss()
        selector = None if mask is None else faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
        share = 1.0 if mask is None else np.count_nonzero(mask) / len(mask)
        if self._kind == "hnsw":
            effort = max(self._settings.hnsw_ef, count) * (1 if mask is None else FILTERED_FACTOR) / share
            return faiss.SearchParametersHNSW(efSearch=min(len(self), int(effort)), sel=selector)
        probes = min(self._index.nlist, int(self._settings.probes / share))
        return faiss.SearchParametersIVF(nprobe=probes, sel=selector)


def write(folder: Path, stored: Vectors, kind: Kind, settings: IndexSettings, *, threads: int) -> None:
    """Make the index of all stored vectors and write it into an artifact's building folder."""
    faiss = _faiss()
    faiss.omp_set_num_threads(threads)
    faiss.cvar.distance_compute_blas_threshold = FAISS_THRESHOLD
    index = untrained(kind, len(stored), stored.shape[1], settings)
    index.train(sample(stored, max(TRAIN_ROWS, TRAIN_PER_LIST * lists(settings, len(stored)))))
    for chunk in chunks(stored):
        index.add(chunk)
    faiss.write_index(index, str(folder / file_of(kind)))


def untrained(kind: Kind, rows: int, dim: int, settings: IndexSettings) -> Any:
    """An empty index by inner product."""
    faiss = _faiss()
    codec, product = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    if kind == "hnsw":
        graph = faiss.IndexHNSWSQ(dim, codec, settings.hnsw_m, product)
        graph.hnsw.efConstruction = EF_CONSTRUCTION
        return graph
    # np: without training for Hamming distances, which are not used and take twenty times as long as all the rest.
    codes = "SQ8" if kind == "ivf_sq" else f"PQ{settings.pq_bytes}np"
    index = faiss.index_factory(dim, f"IVF{lists(settings, rows)},{codes}", product)
    clusterings = [index.cp] if kind == "ivf_sq" else [index.cp, index.pq.cp]
    for clustering in clusterings:
        clustering.niter = TRAIN_ROUNDS
        clustering.max_points_per_centroid = TRAIN_PER_LIST
        clustering.min_points_per_centroid = 1  # of fewer FAISS warns on the standard output
    return index


def lists(settings: IndexSettings, rows: int) -> int:
    """Lists of ivf_sq and ivf_pq."""
    return max(1, min(rows, settings.lists or int(LISTS_PER_ROOT * rows**0.5)))


def sample(stored: Vectors, most: int) -> Vectors:
    """At most so many rows, drawn with a fixed seed: the same index is made from the same vectors."""
    if len(stored) <= most:
        return np.asarray(stored)
    rows = np.random.default_rng(0).choice(len(stored), most, replace=False)
    return np.asarray(stored[np.sort(rows)])


def chunks(stored: Vectors) -> Iterator[Vectors]:
    """All rows, so many at once that the whole never lies in memory twice."""
    for start in range(0, len(stored), ROWS_AT_ONCE):
        yield np.ascontiguousarray(stored[start : start + ROWS_AT_ONCE])


def file_of(kind: Kind) -> str:
    """Name of the file beside the vectors."""
    return f"{kind}.faiss"


def _faiss() -> Any:
    # Its loader logs every instruction set that it does not find.
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    # Threads of OpenMP that wait by spinning take the processor from one another and from the encoder: a search on a
    # busy machine is six times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import faiss

    return faiss
