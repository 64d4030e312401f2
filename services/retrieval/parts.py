"""Finished chunks of a build, kept beside the index until it is published, so that a killed build goes on.

A folder belongs to one encoder (settings and weights); a part holds the vectors of some papers in a row and digests of
their texts, so a part of another corpus is not taken for one of this. The archive's own checksums tell a damaged part,
which counts as none. Parts may be written by several machines that share the folder.
"""

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np

from services.retrieval.encoder import Vectors
from services.retrieval.known import Digests, as_bytes
from services.retrieval.recipe import Recipe
from shared.files import hash_json


def work_folder(target: Path, wanted: Recipe) -> Path:
    """Where parts of the index `target` with this recipe's encoder are kept; made when it is missing."""
    encoder = hash_json([wanted.encoder.as_settings(), wanted.encoder.weights])
    # Not `.index.*`: what is named so is swept by `publish`.
    folder = target.parent / f".{target.name}-parts" / encoder[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_others(folder: Path) -> None:
    """Remove what builds with other encoders left."""
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other)


def remove_all(folder: Path) -> None:
    """Remove every part, once the index is published."""
    shutil.rmtree(folder.parent)


def write_part(folder: Path, first: int, texts: Digests, vectors: Vectors) -> None:
    """Keep the vectors of papers `first`, `first` + 1, …; complete or not there, even when power fails."""
    path = _file(folder, first)
    temporary = path.with_suffix(f".{os.getpid()}")
    with temporary.open("wb") as stream:
        np.savez(stream, texts=as_bytes(texts), vectors=vectors)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def read_part(folder: Path, first: int, texts: Digests) -> Vectors | None:
    """The vectors of just these texts, from `first` on; None when they are not there or damaged."""
    try:
        with _file(folder, first).open("rb") as stream, np.load(stream) as part:
            same = np.array_equal(part["texts"], as_bytes(texts))
            vectors: Vectors = part["vectors"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return vectors if same and len(vectors) == len(texts) else None


def _file(folder: Path, first: int) -> Path:
    return folder / f"part-{first:09d}.npz"
