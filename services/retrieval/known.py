"""Vectors of the index before this one, found by the text they were made from, so that only new texts are embedded.

An index keeps, beside its vectors, a digest of each row's text (`texts.npy`). The vectors of an earlier index may be
taken over when encoder settings and weights are the same; the corpus, and the form of the index, may differ.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from services.retrieval import vector_file
from services.retrieval.encoder import Vectors
from services.retrieval.recipe import Recipe, damaged_file, same_encoder

FILE = "texts.npy"
DIGEST_BYTES = 16
Digests = NDArray[np.void]  # shape [n], one digest each


def digests(texts: Sequence[str]) -> Digests:
    """A digest of each text, shape [n]; equal texts have equal digests, others do not (128 bits)."""
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest() for text in texts)
    return np.frombuffer(joined, dtype=f"V{DIGEST_BYTES}")


def as_bytes(texts: Digests) -> NDArray[np.uint8]:
    """Digests as they are kept in a file, shape [n, DIGEST_BYTES]."""
    return texts.view(np.uint8).reshape(len(texts), DIGEST_BYTES)


class KnownVectors:
    """Vectors by text digest; empty when there is no earlier index to take them from."""

    def __init__(self, vectors: Vectors | None = None, texts: Digests | None = None) -> None:
        self._vectors = vectors
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._sorted: Digests = np.empty(0, dtype=f"V{DIGEST_BYTES}")
        if texts is not None:
            self._order = np.argsort(texts, kind="stable")
            self._sorted = texts[self._order]

    def __len__(self) -> int:
        return len(self._sorted)

    def rows(self, wanted: Digests) -> NDArray[np.int64]:
        """The earlier row of each digest, shape [n]; -1 for a text that is new."""
        if not len(self):
            return np.full(len(wanted), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._sorted, wanted), len(self) - 1)
        return np.where(self._sorted[places] == wanted, self._order[places], -1)

    def vectors(self, rows: NDArray[np.int64]) -> Vectors:
        """The vectors of earlier rows, shape [n, dim]."""
        if self._vectors is None:
            raise ValueError(f"expected no rows, since there is no earlier index; got {len(rows)}")
        return self._vectors[rows]


def known_vectors(folder: Path, wanted: Recipe) -> KnownVectors:
    """What can be taken over from the index in `folder` for one of this recipe; nothing if it is none or differs."""
    files = (FILE, vector_file.FILE)
    if not same_encoder(folder, wanted) or not all((folder / name).is_file() for name in files):
        return KnownVectors()
    if file := damaged_file(folder, files):
        log: structlog.stdlib.BoundLogger = structlog.get_logger()
        log.warning("no vector is taken over, since this is not what the manifest names", file=str(file))
        return KnownVectors()
    texts = np.load(folder / FILE).view(f"V{DIGEST_BYTES}").reshape(-1)
    return KnownVectors(vector_file.read(folder), texts)
