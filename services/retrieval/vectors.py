"""Which form an index takes, what it needs, how much it finds; `write_vectors` makes its files.

Measured with MiniLM's vectors (384 numbers): milliseconds of processor time for the best 10 of one query alone and of
one in a batch of 64, recall@10 on SciFact's claims, bytes of a vector in memory, and seconds to build on 2 busy cores.
The 300,000 are 28,936 real ones and mixtures of two of them with noise.

    rows     kind     alone  in 64  recall  bytes  build
    28,936   flat     1.9    0.23   1       1536   0
             hnsw     0.1    0.10   0.951    528   8
             ivf_sq   0.2    0.10   0.909    428   2
             ivf_pq   0.3    0.17   0.909    122   8
    300,000  flat     33     2.6    1       1536   0
             hnsw     0.2    0.24   0.913    528   270
             ivf_sq   0.4    0.40   0.889    403   47
             ivf_pq   0.5    0.35   0.884     85   82

Encoding a query takes 3 ms alone and 1 in a batch: up to FLAT_ROWS the exact search takes no longer in a batch, and
above it hnsw finds most for its time. All of PubMed, 38 million papers, is 20 GB as hnsw and 3 as ivf_pq. The vectors
themselves then stay in the file, from which a search reads a few rows only.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import structlog

from services.retrieval import faiss_index, vector_file
from services.retrieval.cores import cores
from services.retrieval.flat_index import FlatIndex
from services.retrieval.index import VectorIndex
from services.retrieval.nearest import Vectors
from shared.command import UsageError
from shared.files import ArtifactError
from shared.hardware import memory_gb
from shared.settings import IndexSettings, Settings

Kind = Literal["flat", "hnsw", "ivf_sq", "ivf_pq"]

FLAT_ROWS = 100_000

RECALL_AT = 10
RECALL_QUERIES = 256
# Length of what is added to a stored vector for a query. At 2, hnsw finds 0.961 of the best 10 where it finds 0.956 for
# claims of SciFact, and ivf_sq 0.959 and 0.910; at 1 it is 0.994 and 0.980, which promises too much.
NOISE = 2.0


def kind_for(settings: IndexSettings, rows: int) -> Kind:
    """The kind that is made; `auto` goes by the number of rows, and GPUs search exactly."""
    if settings.kind != "auto":
        return settings.kind
    return "flat" if rows <= FLAT_ROWS or settings.device == "cuda" else "hnsw"


def bytes_needed(kind: Kind, rows: int, dim: int, settings: IndexSettings) -> int:
    """Memory that a search of so many vectors reads, about."""
    centres = faiss_index.lists(settings, rows) * dim * 4
    parts = faiss_index.CENTRES * dim * 4
    return {
        "flat": rows * dim * 4,
        "hnsw": rows * (dim + 9 * settings.hnsw_m),  # 2·m neighbours of 4 bytes, and the upper levels
        "ivf_sq": rows * (dim + 8) + centres,
        "ivf_pq": rows * (settings.pq_bytes + 8) + centres + parts,
    }[kind]


def require_memory(what: str, needed: int, memory: tuple[float, float] | None = None) -> None:
    """Log what is needed beside what there is; ArtifactError when the machine, or our container, never has so much.

    `memory` is GB in all and available, the machine's own unless given. What is not available now may be later, and
    pages of a mapped file count as taken in a container: that is a warning only.
    """
    total, available = memory or memory_gb()
    if needed / 1e9 > total:
        raise ArtifactError(
            f"{what} needs {needed / 1e9:.2f} GB of memory, found {total:.2f} GB in all; give it more, or set "
            "DRZERO_RETRIEVAL__INDEX__KIND=ivf_pq, which needs the least, and build the index again"
        )
    log: structlog.stdlib.BoundLogger = structlog.get_logger()
    tell = log.info if needed / 1e9 <= available else log.warning
    sizes = {"needed_gb": needed / 1e9, "available_gb": available, "total_gb": total}
    tell("memory of the vectors", what=what, **{name: round(size, 3) for name, size in sizes.items()})


def write_vectors(
    folder: Path, vectors: Vectors, settings: Settings, *, queries: Vectors | None = None
) -> dict[str, int]:
    """Make the files of an index from all its vectors: `vectors.npy`, and that of its kind unless that is flat.

    `vectors` may be a map of `<folder>/vectors.npy` itself. Returns counts for the manifest: recall@10 against the
    exact search in thousandths, measured with `queries`, [n, dim], or else with stored vectors and noise.
    UsageError when the kind that is set cannot be had for these vectors.
    """
    index, threads = settings.retrieval.index, cores(settings.retrieval.encoder.threads)
    rows, dim = vectors.shape
    kind = kind_for(index, rows)
    refuse_impossible(kind, rows, dim, index)
    if not (folder / vector_file.FILE).is_file():
        vector_file.write(folder, [vectors], rows=rows, dim=dim)
    stored = vector_file.read(folder)
    if stored.shape != vectors.shape:
        raise ValueError(f"expected {rows} vectors of length {dim} in {folder}, found {stored.shape}")
    if kind == "flat":
        return {"recall_at_10_permille": 1000}
    require_memory(f"building {kind} of {rows:,} vectors", bytes_needed(kind, rows, dim, index))
    faiss_index.write(folder, stored, kind, index, threads=threads)
    named = VectorIndex(stored, faiss_index.FaissIndex.read(folder, kind, index, threads=threads))
    exact = VectorIndex(stored, FlatIndex(stored, threads=threads))
    return {"recall_at_10_permille": round(1000 * recall(named, exact, noisy(stored) if queries is None else queries))}


def refuse_impossible(kind: Kind, rows: int, dim: int, settings: IndexSettings) -> None:
    """UsageError when ivf_pq cannot be made of such vectors."""
    if kind != "ivf_pq":
        return
    if dim % settings.pq_bytes:
        raise UsageError(
            f"retrieval.index.pq_bytes is {settings.pq_bytes}, expected a divisor of the vectors' length {dim}; "
            f"set DRZERO_RETRIEVAL__INDEX__PQ_BYTES={next(n for n in range(settings.pq_bytes, 0, -1) if not dim % n)}"
        )
    if rows < faiss_index.CENTRES:
        raise UsageError(
            f"retrieval.index.kind is ivf_pq, which takes {faiss_index.CENTRES} papers at least, found {rows}; "
            "set DRZERO_RETRIEVAL__INDEX__KIND=flat"
        )


def recall(named: VectorIndex, exact: VectorIndex, queries: Vectors) -> float:
    """The share of the exact best RECALL_AT rows that is found, over all queries."""
    pairs = zip(exact.search(queries, RECALL_AT), named.search(queries, RECALL_AT), strict=True)
    shares = [len({row for _, row in best} & {row for _, row in found}) / len(best) for best, found in pairs]
    return float(np.mean(shares))


def noisy(stored: Vectors) -> Vectors:
    """At most RECALL_QUERIES stored vectors with noise, of length 1; the same ones every time."""
    generator = np.random.default_rng(0)
    rows = np.sort(generator.choice(len(stored), min(RECALL_QUERIES, len(stored)), replace=False))
    noise = generator.normal(size=(len(rows), stored.shape[1])) * NOISE / stored.shape[1] ** 0.5
    queries: Vectors = (stored[rows] + noise).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    return queries
