"""Corpus → `<data>/index`: vectors of every paper's text, its words and filters, in corpus order.

    python -m services.retrieval.build

A finished index that follows the current settings and corpus is kept, and the command says so. Of an index with the
same encoder the vectors of unchanged texts are taken over, so that only new texts are embedded. A killed build leaves
the old index, and what it embedded: the next build goes on there. The new index becomes visible in one step when it is
complete. On several GPUs or machines: `services.retrieval.build_ray`.
"""

import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import structlog

from services.retrieval import vector_file
from services.retrieval.ahead import ahead
from services.retrieval.encoder import Encoder, Vectors, identify
from services.retrieval.filters import write_filters
from services.retrieval.known import FILE as TEXTS
from services.retrieval.known import Digests, KnownVectors, as_bytes, digests, known_vectors
from services.retrieval.parts import read_part, remove_all, remove_others, work_folder, write_part
from services.retrieval.recipe import corpus_folder, index_folder, recipe, same_encoder
from services.retrieval.runtime import RATES, Decision, decide, graph_files, tell_memory
from services.retrieval.vectors import kind_for, refuse_impossible, write_vectors
from services.retrieval.words import write_words
from shared.command import UsageError, run
from shared.corpus import Corpus
from shared.files import Draft, publish, require_free_space, stale_reason
from shared.progress import Progress
from shared.records import Paper
from shared.settings import Settings


@dataclass(frozen=True)
class Sources:
    """Where the vector of a text may come from: an earlier index, a killed build's parts, the encoder."""

    known: KnownVectors
    parts: Path
    encoder: Encoder


def build(settings: Settings, log: structlog.stdlib.BoundLogger) -> bool:
    """Make the index unless the published one is current; True when it was made.

    Raises ArtifactError (no corpus, no model, no disk), UsageError (empty corpus).
    """
    corpus = Corpus(corpus_folder(settings))
    target = index_folder(settings)
    wanted = recipe(corpus.manifest, identify(settings), settings.retrieval.index)
    stale = stale_reason(target, settings=wanted.settings, made_from=wanted.made_from)
    if stale is None:
        log.info("index is current and is kept", index=str(target), papers=len(corpus))
        return False
    if not len(corpus):
        raise UsageError(f"the corpus {corpus.path} holds no papers, expected at least one; ingest some first")
    log.info("building the index", reason=stale, papers=len(corpus), encoder=settings.retrieval.encoder.model)
    require_free_space(target, settings.storage.min_free_gb)
    tell_memory(settings)
    parts = work_folder(target, wanted)
    with publish(target, settings=wanted.settings, made_from=wanted.made_from) as draft:
        remove_others(parts)
        earlier = target if same_encoder(target, wanted) else None
        decision = decide(settings, corpus, parts, earlier)
        sources = Sources(known_vectors(target, wanted), parts, Encoder.for_documents(settings, parts))
        fill(draft, corpus, sources, decision, settings)
    remove_all(parts)
    log.info("index is complete", index=str(target), papers=draft.rows)
    return True


def fill(draft: Draft, corpus: Corpus, sources: Sources, decision: Decision, settings: Settings) -> None:
    """Write the files of an index into its building folder, vectors first, and say what was made."""
    log: structlog.stdlib.BoundLogger = structlog.get_logger()
    require_possible(len(corpus), sources.encoder.dim, settings)
    started = time.monotonic()
    counts = embed(corpus, sources, draft.path, settings, decision.chunk)
    rate = len(corpus) / (time.monotonic() - started)
    log.info("vectors are complete", **counts, papers_per_second=round(rate, 1))
    for file in graph_files(sources.parts):
        shutil.copy2(file, draft.path)
    draft.rows = len(corpus)
    draft.counts = {"papers": len(corpus), "dim": sources.encoder.dim, **counts}
    draft.counts |= {RATES[name]: speed for name, speed in decision.rates.items()}
    draft.counts |= write_vectors(draft.path, vector_file.read(draft.path), settings)
    write_words(corpus, draft.path)
    write_filters(corpus, draft.path)


def require_possible(papers: int, dim: int, settings: Settings) -> None:
    """UsageError when the kind that is set cannot be made, before hours of embedding rather than after."""
    index = settings.retrieval.index
    refuse_impossible(kind_for(index, papers), papers, dim, index)


def embed(corpus: Corpus, sources: Sources, folder: Path, settings: Settings, chunk: int) -> dict[str, int]:
    """Write the vectors of all papers, row i for paper i, and the digests of their texts; how many came from where.

    The vectors are written through a map of their file, so memory does not grow with the corpus.
    """
    seen: list[Digests] = []
    counts: Counter[str] = Counter()

    def vectors() -> Iterator[Vectors]:
        first = 0
        for papers in ahead(chunks(corpus, chunk)):
            texts = [paper.text for paper in papers]
            seen.append(digests(texts))
            found, origin = vectors_of(texts, first, sources)
            counts.update(origin)
            yield found
            first += len(texts)
            progress.advance(len(texts))

    with Progress("index", settings, total=len(corpus)) as progress:
        vector_file.write(folder, vectors(), rows=len(corpus), dim=sources.encoder.dim)
    np.save(folder / TEXTS, as_bytes(np.concatenate(seen)))
    return {origin: counts[origin] for origin in ("embedded", "reused", "resumed")}


def vectors_of(texts: list[str], first: int, sources: Sources) -> tuple[Vectors, Counter[str]]:
    """The vectors of a chunk from paper `first` on, and how many came from where; new ones are kept as a part."""
    marks = digests(texts)
    kept = read_part(sources.parts, first, marks)
    if kept is not None:
        return kept, Counter(resumed=len(texts))
    rows = sources.known.rows(marks)
    old, new = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0)
    vectors = np.empty((len(texts), sources.encoder.dim), dtype=np.float32)
    if len(old):
        vectors[old] = sources.known.vectors(rows[old])
    if len(new):
        vectors[new] = embedded([texts[row] for row in new], sources.encoder)
        write_part(sources.parts, first, marks, vectors)
    return vectors, Counter(embedded=len(new), reused=len(old))


def embedded(texts: list[str], encoder: Encoder) -> Vectors:
    """The vectors of texts; UsageError when they are not numbers."""
    vectors = encoder.encode(texts)
    if not np.isfinite(vectors).all():
        raise UsageError(
            "the encoder gave vectors that are not numbers at the precision of retrieval.encoder.dtype; "
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
