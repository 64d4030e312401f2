"""Corpus → `<data>/index`: every paper's text embedded, in corpus order. Run: `python -m services.retrieval.build`.

A finished index that follows the current settings and corpus is kept, and the command says so. Of an index that differs
in the corpus alone, the vectors of unchanged texts are taken over, so that only new texts are embedded. The new index
becomes visible in one step when it is complete; a killed build leaves the old one.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import structlog
from numpy.typing import NDArray

from services.retrieval.ahead import ahead
from services.retrieval.encoder import Encoder, Vectors, identify
from services.retrieval.index import FlatIndex
from services.retrieval.known import FILE as TEXTS
from services.retrieval.known import Digests, KnownVectors, digests, known_vectors
from services.retrieval.recipe import corpus_folder, index_folder, recipe
from shared.command import UsageError, run
from shared.corpus import Corpus
from shared.files import publish, require_free_space, stale_reason
from shared.progress import Progress
from shared.records import Paper
from shared.settings import Settings

# Texts are sorted by length within a chunk; longer chunks hardly save more padding, and progress is told once a chunk.
BATCHES_PER_CHUNK = 16
BATCHES_PER_CHUNK_ON_GPU = 64  # the card waits at the start of a chunk, while the first texts are tokenised


def build(settings: Settings, log: structlog.stdlib.BoundLogger) -> bool:
    """Make the index unless the published one is current; True when it was made.

    Raises ArtifactError (no corpus, no model, no disk), UsageError (empty corpus).
    """
    corpus = Corpus(corpus_folder(settings))
    target = index_folder(settings)
    wanted = recipe(corpus.manifest, identify(settings))
    stale = stale_reason(target, settings=wanted.settings, made_from=wanted.made_from)
    if stale is None:
        log.info("index is current and is kept", index=str(target), papers=len(corpus))
        return False
    if not len(corpus):
        raise UsageError(f"the corpus {corpus.path} holds no papers, expected at least one; ingest some first")
    log.info("building the index", reason=stale, papers=len(corpus), encoder=settings.retrieval.encoder.model)
    require_free_space(target, settings.storage.min_free_gb)
    known = known_vectors(target, wanted)
    with publish(target, settings=wanted.settings, made_from=wanted.made_from) as draft:
        index, texts, reused = embed(corpus, Encoder(settings), settings, known)
        index.write(draft.path)
        np.save(draft.path / TEXTS, texts.view(np.uint8).reshape(len(texts), -1))
        draft.rows = len(index)
        draft.counts = {"papers": len(corpus), "dim": index.dim, "embedded": len(index) - reused, "reused": reused}
    log.info("index is complete", index=str(target), papers=len(index), dim=index.dim, reused=reused)
    return True


def embed(corpus: Corpus, encoder: Encoder, settings: Settings, known: KnownVectors) -> tuple[FlatIndex, Digests, int]:
    """The index of all papers, row i for paper i; the digests of their texts; how many vectors were known already."""
    index = FlatIndex.empty(encoder.dim)
    seen: list[Digests] = []
    reused = 0
    size = encoder.batch_size * (BATCHES_PER_CHUNK if encoder.card is None else BATCHES_PER_CHUNK_ON_GPU)
    with Progress("index", settings, total=len(corpus)) as progress:
        for papers in ahead(chunks(corpus, size)):
            texts = [paper.text for paper in papers]
            seen.append(digests(texts))
            rows = known.rows(seen[-1])
            index.add(vectors_of(texts, rows, encoder, known, settings))
            reused += int((rows >= 0).sum())
            progress.advance(len(papers))
    return index, np.concatenate(seen), reused


def vectors_of(
    texts: list[str], rows: NDArray[np.int64], encoder: Encoder, known: KnownVectors, settings: Settings
) -> Vectors:
    """The vectors of texts, shape [n, dim]: known ones by their earlier row, the others (row -1) embedded."""
    vectors = np.empty((len(texts), encoder.dim), dtype=np.float32)
    old, new = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0)
    if len(old):
        vectors[old] = known.vectors(rows[old])
    if len(new):
        vectors[new] = encoder.encode([texts[row] for row in new])
    if not np.isfinite(vectors).all():
        raise UsageError(
            f"the encoder gave vectors that are not numbers at precision {settings.retrieval.encoder.dtype}; "
            "set DRZERO_RETRIEVAL__ENCODER__DTYPE=float32"
        )
    return vectors


def chunks(papers: Iterable[Paper], size: int) -> Iterator[list[Paper]]:
    """Lists of `size` papers in order; the last may be shorter."""
    rest = iter(papers)
    while chunk := list(islice(rest, size)):
        yield chunk


def main(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """The command."""
    build(settings, log)


if __name__ == "__main__":
    raise SystemExit(run("retrieval.build", main))
