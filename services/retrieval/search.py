"""The library call: queries → papers, without a server.

    searcher = Searcher(settings)
    hits = searcher.search(["tamoxifen resistance"], top_k=3)

Opening checks that the index was made from this corpus with this encoder; an ArtifactError says what differs.
Not thread-safe: use it from the thread that made it.
"""

from collections.abc import Sequence

from prometheus_client import Gauge, Histogram

from services.retrieval.batching import BATCH_QUERIES
from services.retrieval.encoder import Encoder, identify
from services.retrieval.placement import open_index
from services.retrieval.recipe import REMEDY, corpus_folder, difference, index_folder, recipe, require
from shared.corpus import Corpus
from shared.files import ArtifactError, read_manifest
from shared.metrics import REGISTRY, SECONDS
from shared.records import Hit, Paper
from shared.settings import Settings

RECORDS = Gauge(
    "drzero_retrieval_corpus_records",
    "Records of the corpus in use, by what ingest counted.",
    ["count"],
    registry=REGISTRY,
)
STAGE_SECONDS = Histogram(
    "drzero_retrieval_stage_seconds",
    "Time of one micro-batch in a stage: encode, search, fetch.",
    ["stage"],
    buckets=SECONDS,
    registry=REGISTRY,
)

WARM_UP = (1, 8, 64, BATCH_QUERIES)
WARM_UP_QUERY = "Does metformin lower mortality in sepsis? "


class Searcher:
    """Encoder, index and corpus that belong together."""

    def __init__(self, settings: Settings) -> None:
        # The links are resolved once, so that versions published later do not mix into this searcher.
        self.corpus = Corpus(corpus_folder(settings))
        for name, number in self.corpus.manifest.counts.items():
            RECORDS.labels(name).set(number)
        folder = require(index_folder(settings), "services.retrieval.build").resolve()
        manifest = read_manifest(folder)
        problem = difference(manifest, recipe(self.corpus.manifest, identify(settings)), index_folder(settings))
        if problem:
            raise ArtifactError(problem)
        self.encoder = Encoder(settings)
        self.index = open_index(folder, settings.retrieval, self.encoder.card)
        if not len(self.index) == manifest.rows == len(self.corpus) or self.index.dim != self.encoder.dim:
            raise ArtifactError(
                f"expected {len(self.corpus)} vectors of length {self.encoder.dim} in {folder}, "
                f"found {len(self.index)} of length {self.index.dim}; {REMEDY}"
            )
        if self.encoder.card is not None:
            self._warm_up(settings.retrieval.top_k)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """The best papers of each query, best first; at most top_k, fewer when the corpus is smaller."""
        return self.search_each(queries, [top_k] * len(queries))

    def search_each(self, queries: Sequence[str], top_ks: Sequence[int]) -> list[list[Hit]]:
        """`search` with a number of papers per query, all encoded and searched together."""
        if not queries:
            return []
        with STAGE_SECONDS.labels("encode").time():
            vectors = self.encoder.encode(queries)
        with STAGE_SECONDS.labels("search").time():
            found = self.index.search(vectors, max(top_ks))
        with STAGE_SECONDS.labels("fetch").time():
            return [
                [Hit(self.corpus[row], score) for score, row in rows[:top_k]]
                for rows, top_k in zip(found, top_ks, strict=True)
            ]

    def _warm_up(self, top_k: int) -> None:
        """Run every size once: a GPU loads a kernel at its first use, and sizes differ in their kernels."""
        for size in WARM_UP:
            queries = [WARM_UP_QUERY * (1 + place % 2) for place in range(size)]  # two lengths, so that some is padding
            self.index.search(self.encoder.encode(queries), top_k)

    def find(self, pmid: str) -> Paper | None:
        """The paper with this PMID, or None."""
        return self.corpus.find(pmid)
