"""The vectors of an index on disk: `vectors.npy`, float32, one row per paper, as numpy writes it.

It is read as a memory map, so that opening takes no time and replicas share its pages.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from services.retrieval.nearest import Vectors
from shared.files import ArtifactError

FILE = "vectors.npy"


def write(folder: Path, chunks: Iterable[Vectors], *, rows: int, dim: int) -> None:
    """Write all chunks in their order; ValueError unless they are `rows` vectors of length `dim` together."""
    stored = open_memmap(folder / FILE, mode="w+", dtype=np.float32, shape=(rows, dim))
    end = 0
    for chunk in chunks:
        stored[end : end + len(chunk)] = chunk
        end += len(chunk)
    if end != rows:
        raise ValueError(f"expected {rows} vectors for {folder / FILE}, got {end}")
    stored.flush()


def read(folder: Path) -> Vectors:
    """The vectors of an index, shape [rows, dim], read-only; ArtifactError when the file is missing or damaged."""
    path = folder / FILE
    try:
        stored: Vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{path} holds no vectors ({error}); delete {folder} and make it again") from error
    if stored.dtype != np.float32 or stored.ndim != 2:
        raise ArtifactError(
            f"expected rows of float32 in {path}, found {stored.dtype} of shape {stored.shape}; "
            f"delete {folder} and make it again"
        )
    return stored.view(np.ndarray)  # numpy's class for maps is slow to index
