"""Queries → rows of the corpus with their scores: by vectors, by words, or by both. No papers, no service.

All queries of a call are encoded and searched together, and a query's rows and order are the same alone and among
others: what it is searched for depends on the query alone, never on the batch. Not thread-safe, but one thread may
encode while another one ranks.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from prometheus_client import Histogram

from services.retrieval.encoder import Begun
from services.retrieval.filters import FilterIndex
from services.retrieval.fusion import best_first, reciprocal_ranks, relative_sum
from services.retrieval.index import VectorIndex
from services.retrieval.nearest import Mask, Rows, Vectors, inner_products
from services.retrieval.query import Query
from services.retrieval.words import WordIndex
from shared.metrics import REGISTRY, SECONDS
from shared.settings import RetrievalSettings

STAGE_SECONDS = Histogram(
    "drzero_retrieval_stage_seconds",
    "Time of one micro-batch in a stage: encode, search, words, fuse, fetch, rerank, highlight.",
    ["stage"],
    buckets=SECONDS,
    registry=REGISTRY,
)


TextVectors = Mapping[str, Vectors]  # text → its vector, shape [dim]


class Encodes(Protocol):
    """What ranking needs of an encoder."""

    def encode(self, texts: Sequence[str], begun: Begun | None = None) -> Vectors: ...


class Parts(NamedTuple):
    """What belongs together in one index."""

    encoder: Encodes
    vectors: VectorIndex
    words: WordIndex
    filters: FilterIndex


class Ranked(NamedTuple):
    """A row that a query finds; `dense` and `bm25` are None where its mode does not search by them."""

    row: int
    score: float
    dense: float | None
    bm25: float | None


@dataclass(slots=True, eq=False)
class Task:
    """One query on its way: the best `count` rows are wanted, of rankings that are `depth` long."""

    query: Query
    count: int
    depth: int
    allowed: Mask | None
    vector: Vectors = field(default_factory=lambda: np.empty(0, np.float32))
    near: Rows = field(default_factory=list)
    worded: Rows = field(default_factory=list)


class Ranker:
    """The search of one index."""

    def __init__(self, parts: Parts, settings: RetrievalSettings) -> None:
        self._encoder, self._vectors, self._words, self._filters = parts
        self._settings = settings

    def encode(self, queries: Sequence[Query], begun: Begun | None = None) -> TextVectors:
        """The vectors of the queries that are searched by them; equal texts are encoded once. `begun` as in Encoder."""
        texts = list(dict.fromkeys(query.text for query in queries if query.mode != "bm25"))
        if not texts:
            return {}
        with STAGE_SECONDS.labels("encode").time():
            return dict(zip(texts, self._encoder.encode(texts, begun), strict=True))

    def rank(self, queries: Sequence[Query], counts: Sequence[int], vectors: TextVectors) -> list[list[Ranked]]:
        """The best rows of each query, best first: as many as its count, fewer when fewer can be found.

        `vectors` is what `encode` has made of the queries.
        """
        tasks = [
            Task(query, count, self._depth(query, count), self._filters.allowed(query.filters))
            for query, count in zip(queries, counts, strict=True)
        ]
        if by_vectors := [task for task in tasks if task.query.mode != "bm25"]:
            with STAGE_SECONDS.labels("search").time():
                for task in by_vectors:
                    task.vector = vectors[task.query.text]
                self._search(by_vectors)
        if by_words := [task for task in tasks if task.query.mode != "dense"]:
            with STAGE_SECONDS.labels("words").time():
                for task in by_words:
                    task.worded = self._words.search(task.query.text, task.depth, task.allowed)
        both = [task for task in tasks if task.query.mode == "hybrid"]
        with STAGE_SECONDS.labels("fuse").time():
            fused = iter(self._fused(both))
            return [next(fused) if task.query.mode == "hybrid" else _alone(task) for task in tasks]

    def _depth(self, query: Query, count: int) -> int:
        """How many rows of each ranking a query needs."""
        return max(count, self._settings.candidates) if query.mode == "hybrid" else count

    def _search(self, tasks: Sequence[Task]) -> None:
        """Give each task its nearest rows. Tasks of one depth go together: an approximate search depends on it."""
        by_depth: dict[int, list[Task]] = defaultdict(list)
        for task in tasks:
            by_depth[task.depth].append(task)
        for depth, group in by_depth.items():
            masks = [task.allowed for task in group]
            some = masks if any(mask is not None for mask in masks) else None
            found = self._vectors.search(np.stack([task.vector for task in group]), depth, some)
            for task, near in zip(group, found, strict=True):
                task.near = near

    def _fused(self, tasks: Sequence[Task]) -> list[list[Ranked]]:
        """One ranking for each task from its two, every candidate of either scored by both."""
        only_worded = [sorted({row for _, row in task.worded} - {row for _, row in task.near}) for task in tasks]
        gathered = self._vectors.vectors(np.array([row for rows in only_worded for row in rows], dtype=np.int64))
        ranked: list[list[Ranked]] = []
        first = 0
        for task, rows in zip(tasks, only_worded, strict=True):
            own = gathered[first : first + len(rows)]
            first += len(rows)
            dense = dict(zip(rows, inner_products(own, task.vector).tolist(), strict=True))
            dense |= {row: score for score, row in task.near}
            words = {row: score for score, row in task.worded}
            words |= self._words.scores(task.query.text, [row for row in dense if row not in words])
            ranked.append(self._fuse(task, dense, words))
        return ranked

    def _fuse(self, task: Task, dense: dict[int, float], words: dict[int, float]) -> list[Ranked]:
        """The best rows of one task from its candidates' scores by both searches."""
        listed = sorted(dense)
        rows = np.array(listed, dtype=np.int64)
        share = self._settings.dense_share
        if self._settings.fusion == "ranks":
            near = np.array([row for _, row in task.near], dtype=np.int64)
            worded = np.array([row for _, row in task.worded], dtype=np.int64)
            scores = reciprocal_ranks(rows, near, worded, dense_share=share)
        else:
            by_vectors = np.array([dense[row] for row in listed])
            by_words = np.array([words[row] for row in listed])
            scores = relative_sum(by_vectors, by_words, dense_share=share)
        order = best_first(scores, rows, task.count)
        best = zip(rows[order].tolist(), scores[order].tolist(), strict=True)
        return [Ranked(row, score, dense[row], words[row]) for row, score in best]


def _alone(task: Task) -> list[Ranked]:
    """The ranking of a task that is searched in one way."""
    if task.query.mode == "dense":
        return [Ranked(row, score, score, None) for score, row in task.near[: task.count]]
    return [Ranked(row, score, None, score) for score, row in task.worded[: task.count]]
