"""The library call: queries → papers, without a server.

    searcher = Searcher(settings)
    hits = searcher.search(["tamoxifen resistance"], top_k=3)

Opening checks that the index was made from this corpus with this encoder; an ArtifactError says what differs.
Not thread-safe: use it from the thread that made it; `encode` alone may run in another one, for the next queries.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import Gauge

from services.retrieval import filters, words
from services.retrieval.batching import BATCH_QUERIES
from services.retrieval.encoder import Begun, Encoder, identify
from services.retrieval.highlights import best_sentence
from services.retrieval.placement import open_vectors
from services.retrieval.query import Query
from services.retrieval.ranking import STAGE_SECONDS, Parts, Ranker, TextVectors
from services.retrieval.recipe import REMEDY, corpus_folder, difference, index_folder, recipe, require
from services.retrieval.rerank import CrossEncoder, NoReranker
from services.retrieval.terms import terms
from shared.corpus import DEAD, Corpus
from shared.files import ArtifactError, read_manifest
from shared.ledger import NO_ROW
from shared.metrics import REGISTRY
from shared.pmids import number
from shared.records import Hit, Paper
from shared.settings import Settings

RECORDS = Gauge(
    "drzero_retrieval_corpus_records",
    "Records of the corpus in use, by what ingest counted.",
    ["count"],
    registry=REGISTRY,
)

PAPERS_KEPT = 8192  # about 5 kB each; one that is not kept is decoded again
WARM_UP = (1, 8, 64, BATCH_QUERIES)
WARM_UP_QUERY = "Does metformin lower mortality in sepsis? "


class Searcher:
    """Encoder, index and corpus that belong together."""

    def __init__(self, settings: Settings) -> None:
        # The links are resolved once, so that versions published later do not mix into this searcher.
        self.corpus = Corpus(corpus_folder(settings))
        for name, count in self.corpus.manifest.counts.items():
            RECORDS.labels(name).set(count)
        folder = require(index_folder(settings), "services.retrieval.build").resolve()
        self.manifest = read_manifest(folder)
        wanted = recipe(self.corpus.manifest, identify(settings), settings.retrieval.index)
        problem = difference(self.manifest, wanted, index_folder(settings))
        if problem:
            raise ArtifactError(problem)
        self._settings = settings.retrieval
        self.encoder = Encoder.for_queries(settings, folder)
        self.index = open_vectors(folder, settings.retrieval, self.encoder.card)
        self.words = words.WordIndex.read(folder / words.FOLDER)
        self.filters = filters.FilterIndex.read(folder / filters.FOLDER)
        self._require_fit(folder)
        self._ranker = Ranker(Parts(self.encoder, self.index, self.words, self.filters), settings.retrieval)
        self._reranker = CrossEncoder(model, settings) if (model := settings.retrieval.rerank_model) else None
        self._paper = lru_cache(maxsize=PAPERS_KEPT)(self.corpus.__getitem__)
        if self.encoder.card is not None:
            self._warm_up()

    def search(self, texts: Sequence[str], top_k: int | None = None) -> list[list[Hit]]:
        """The best papers of each text, best first, as the settings have it; fewer than top_k if fewer can be found."""
        return self.search_each([Query.plain(text, self._settings, top_k) for text in texts])

    @property
    def overlaps(self) -> bool:
        """Whether a second thread may `encode` when the first has said that it has begun with its last."""
        return self.encoder.overlaps

    def encode(self, queries: Sequence[Query], begun: Begun | None = None) -> TextVectors:
        """The first half of `search_each`, for its `vectors`; `begun` as in Encoder."""
        return self._ranker.encode(queries, begun)

    def search_each(self, queries: Sequence[Query], vectors: TextVectors | None = None) -> list[list[Hit]]:
        """The best papers of each query, all encoded and searched together; `vectors` are those of `encode`.

        Raises rerank.NoReranker when a query wants to be reranked and no model is set.
        """
        if not queries:
            return []
        if self._reranker is None and any(query.rerank for query in queries):
            raise NoReranker(
                "expected retrieval.rerank_model for a query with rerank, found none; set it or ask without"
            )
        vectors = self.encode(queries) if vectors is None else vectors
        ranked = self._ranker.rank(queries, [self._count(query) for query in queries], vectors)
        with STAGE_SECONDS.labels("fetch").time():
            # In order, so that rows of one group follow one another and it is decoded once.
            papers = {row: self._paper(row) for row in sorted({found.row for rows in ranked for found in rows})}
            hits = [[Hit(papers[row], score, dense, bm25) for row, score, dense, bm25 in rows] for rows in ranked]
        hits = self._reranked(queries, hits)
        return self._highlighted(queries, hits)

    def similar(self, pmid: str, top_k: int) -> list[Hit] | None:
        """The papers whose vectors are nearest to that of one paper, without itself; None if there is no such paper."""
        row = row_of(self.corpus, pmid)
        if row is None:
            return None
        depth = max(top_k + 1, self._settings.candidates)
        (near,) = self.index.search(self.index.vectors(np.array([row], dtype=np.int64)), depth)
        others = [(score, other) for score, other in near if other != row][:top_k]
        return [Hit(self._paper(other), score, dense=score) for score, other in others]

    def find(self, pmid: str) -> Paper | None:
        """The paper with this PMID, or None."""
        return self.corpus.find(pmid)

    def info(self) -> dict[str, Any]:
        """Encoder, index and corpus in use, JSON-ready."""
        corpus = self.corpus.manifest
        return {
            "encoder": {"model": self._settings.encoder.model, "dim": self.encoder.dim, "card": self.encoder.card},
            "index": {
                "identity": self.manifest.identity,
                "rows": self.manifest.rows,
                "settings": dict(self.manifest.settings),
                "counts": dict(self.manifest.counts),
                "bytes_by_place": dict(self.index.bytes_by_place),
                "seconds_to_build": self.manifest.seconds,
            },
            "corpus": {"identity": corpus.identity, "papers": len(self.corpus), "counts": dict(corpus.counts)},
            "rerank_model": self._settings.rerank_model,
        }

    def _count(self, query: Query) -> int:
        """How many rows a query's ranking needs: a reranker reads more papers than are asked for."""
        return max(query.top_k, self._settings.rerank_candidates) if query.rerank else query.top_k

    def _reranked(self, queries: Sequence[Query], hits: list[list[Hit]]) -> list[list[Hit]]:
        """The hits with those of queries that want it in the cross-encoder's order, cut to their number."""
        if self._reranker is None or not any(query.rerank for query in queries):
            return hits
        with STAGE_SECONDS.labels("rerank").time():
            return [
                reranked(self._reranker, query, found) if query.rerank else found
                for query, found in zip(queries, hits, strict=True)
            ]

    def _highlighted(self, queries: Sequence[Query], hits: list[list[Hit]]) -> list[list[Hit]]:
        """The hits, those of queries that want it with their best sentence."""
        if not any(query.highlight for query in queries):
            return hits
        with STAGE_SECONDS.labels("highlight").time():
            return [
                self._with_sentences(query.text, found) if query.highlight else found
                for query, found in zip(queries, hits, strict=True)
            ]

    def _with_sentences(self, text: str, hits: Sequence[Hit]) -> list[Hit]:
        weights = {term: rarity(self.words.papers_with(term), len(self.words)) for term in terms(text)}
        return [replace(hit, highlight=best_sentence(hit.paper.abstract, weights)) for hit in hits]

    def _require_fit(self, folder: Path) -> None:
        """Raise ArtifactError unless all parts of the index hold the corpus' papers."""
        papers = len(self.corpus)
        found = (len(self.index), len(self.words), len(self.filters), self.manifest.rows)
        if found != (papers,) * 4 or self.index.dim != self.encoder.dim:
            raise ArtifactError(
                f"expected {papers} papers with vectors of length {self.encoder.dim} in {folder}, found {found[0]} "
                f"vectors of length {self.index.dim}, words of {found[1]}, filters of {found[2]}; {REMEDY}"
            )

    def _warm_up(self) -> None:
        """Run every size once: a GPU loads a kernel at its first use, and sizes differ in their kernels."""
        for size in WARM_UP:
            # Different texts, because equal ones are encoded once; of two lengths, so that some is padding.
            texts = [f"{WARM_UP_QUERY * (1 + place % 2)}{place}" for place in range(size)]
            queries = [Query(text, 1, "dense") for text in texts]
            self._ranker.rank(queries, [1] * size, self._ranker.encode(queries))


def row_of(corpus: Corpus, pmid: str) -> int | None:
    """The row of the paper with this PMID, or None."""
    place = corpus.ledger.place(number(pmid))
    if place is None or corpus.ledger.rows[place] == NO_ROW:
        return None
    row = int(corpus.ledger.rows[place])
    return row - int(np.searchsorted(np.load(corpus.path / DEAD), row))


def rarity(papers: int, of: int) -> float:
    """The weight of a term that stands in so many papers of all, as BM25 has it; above 0."""
    return math.log1p((of - papers + 0.5) / (papers + 0.5))


def reranked(reranker: CrossEncoder, query: Query, hits: Sequence[Hit]) -> list[Hit]:
    """The best hits by the reranker's scores; equal ones keep their order."""
    scores = reranker.scores(query.text, [hit.paper.text for hit in hits])
    scored = [replace(hit, score=score) for hit, score in zip(hits, scores, strict=True)]
    return sorted(scored, key=lambda hit: -hit.score)[: query.top_k]
