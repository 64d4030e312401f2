"""Micro-batching: requests that wait together are encoded together and searched together.

An asyncio task takes what waits, has it encoded in one thread and searched in another, and hands each request its own
part. The next batch begins to be encoded as soon as the cores have the last of the one before, and is encoded while
that is searched: no core waits for another, nor for this task. An idle service answers at once: there is no waiting
window. The queue is bounded in queries; when it is full, `QueueFull` tells the caller to come back. Whoever has waited
longer than its deadline hears `DeadlinePassed`; whoever no longer waits leaves the queue. Searching twice at once never
happens.

Fair: of each batch a request gets SHARE queries, more only when others leave room, and a request that has not got all
goes to the end of the queue; so one of hundreds of queries is answered in several batches, and small ones between.
A batch is as large as BATCH_S allows, at most BATCH_QUERIES. Requests keep the searcher that they came with: a batch
is one searcher's. An error of a batch goes to the requests that also fail alone.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any, Protocol

from prometheus_client import Counter, Gauge, Histogram

from services.retrieval.query import Query
from shared.metrics import REGISTRY, SECONDS, from_zero
from shared.records import Hit

BATCH_QUERIES = 256  # a longer batch makes everybody wait longer and is hardly faster per query
LEAST_QUERIES = 32  # a shorter batch is much slower per query
FIRST_QUERIES = 64
SHARE = 16
BATCH_S = 0.1  # what a batch may take: whoever arrives has to wait for it

WAITING = Gauge("drzero_retrieval_queue_queries", "Queries that wait for the search thread.", registry=REGISTRY)
LIMIT = Gauge("drzero_retrieval_queue_limit_queries", "Most queries that may wait.", registry=REGISTRY)
BATCH = Histogram(
    "drzero_retrieval_batch_queries",
    "Queries answered together.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    registry=REGISTRY,
)
WAIT_SECONDS = Histogram(
    "drzero_retrieval_queue_seconds",
    "Time a request waits until the search thread begins with it.",
    buckets=SECONDS,
    registry=REGISTRY,
)
REJECTIONS = Counter(
    "drzero_retrieval_rejections_total", "Requests not answered, by reason.", ["reason"], registry=REGISTRY
)
from_zero(REJECTIONS, "queue full", "deadline", "too large", "not ready")


class Busy(RuntimeError):
    """The service has too much to do; the same request may succeed a moment later."""


class QueueFull(Busy):
    """More queries wait than the service accepts."""


class DeadlinePassed(Busy):
    """A request was not answered within its time."""


class SearchesEach(Protocol):
    """What a batch needs of a searcher."""

    def encode(self, queries: Sequence[Query], begun: Callable[[], object]) -> Any: ...

    def search_each(self, queries: Sequence[Query], vectors: Any = None) -> list[list[Hit]]: ...


class Engine(Protocol):
    """A searcher, the one thread in which it searches, and those in which it encodes: as many as it can use."""

    @property
    def searcher(self) -> SearchesEach: ...

    @property
    def thread(self) -> Executor: ...

    @property
    def encoding(self) -> Executor: ...


@dataclass(eq=False)
class Job:
    """One request in the queue, and what has been found for the first of its queries."""

    engine: Engine
    queries: Sequence[Query]
    answer: asyncio.Future[list[list[Hit]]]
    since: float
    hits: list[list[Hit]] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Queries that have no hits yet."""
        return len(self.queries) - len(self.hits)


@dataclass(frozen=True)
class Part:
    """The next `queries` of a job, as far as one batch has room for them."""

    job: Job
    queries: Sequence[Query]


class Batcher:
    """The queue and its worker. Lives in one event loop; `run()` must be running for answers to come."""

    def __init__(self, *, queue_queries: int) -> None:
        self._limit = queue_queries
        LIMIT.set(queue_queries)
        self._room = FIRST_QUERIES
        self._jobs: dict[Job, None] = {}  # in order of arrival; a dict because jobs leave it anywhere
        self._waiting = 0
        self._arrived = asyncio.Event()

    async def search(self, engine: Engine, queries: Sequence[Query], *, within_s: float) -> list[list[Hit]]:
        """Hits per query, best first; raises QueueFull or DeadlinePassed.

        A request that is by itself above the limit is taken when nothing else waits.
        """
        if not queries:
            return []
        if self._waiting and self._waiting + len(queries) > self._limit:
            REJECTIONS.labels("queue full").inc()
            raise QueueFull(f"{self._waiting} queries wait already, at most {self._limit} may; try again in a moment")
        loop = asyncio.get_running_loop()
        job = Job(engine, queries, loop.create_future(), loop.time())
        self._enter(job)
        alarm = loop.call_later(within_s, _give_up, job, within_s)
        try:
            return await job.answer
        finally:
            alarm.cancel()
            if job in self._jobs:
                self._leave(job)

    async def run(self) -> None:
        """Answer batch after batch, until cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            before: asyncio.Task[None] | None = None
            while True:
                await self._arrived.wait()
                parts = self._take()
                if not parts:
                    continue
                for part in parts:
                    if not part.job.hits:
                        WAIT_SECONDS.observe(loop.time() - part.job.since)
                vectors, begun = _encode(parts)
                work = group.create_task(self._search(parts, vectors, before))
                await begun.wait()
                if before is not None:
                    await before
                before = work

    async def _search(
        self, parts: Sequence[Part], vectors: asyncio.Future[Any], before: asyncio.Task[None] | None
    ) -> None:
        """Answer a batch that is being encoded, after the one before; whoever has given up until then is left out."""
        started = asyncio.get_running_loop().time()
        await asyncio.wait([vectors, before] if before else [vectors])
        wanted = [part for part in parts if not part.job.answer.done()]
        if not wanted:
            return
        await _answer(wanted, vectors)
        self._adapt(sum(len(part.queries) for part in wanted), asyncio.get_running_loop().time() - started)
        for part in wanted:
            if part.job.left and not part.job.answer.done():
                self._enter(part.job)

    def _take(self) -> list[Part]:
        """The parts of the next batch; their jobs leave the queue."""
        engine = next(iter(self._jobs)).engine
        sizes: dict[Job, int] = {}
        room = self._room
        waiting = list(takewhile(lambda job: job.engine is engine, self._jobs))
        for share in (SHARE, room):
            for job in waiting:
                more = min(share, job.left - sizes.get(job, 0), room)
                if more:
                    sizes[job] = sizes.get(job, 0) + more
                    room -= more
        for job in sizes:
            self._leave(job)
        return [
            Part(job, job.queries[len(job.hits) : len(job.hits) + size])
            for job, size in sizes.items()
            if not job.answer.done()
        ]

    def _adapt(self, size: int, seconds: float) -> None:
        """Halve the room after a batch that took too long, double it after a full one that was fast."""
        if seconds > BATCH_S:
            self._room = max(LEAST_QUERIES, self._room // 2)
        elif size >= self._room and seconds < BATCH_S / 2:
            self._room = min(BATCH_QUERIES, self._room * 2)

    def _enter(self, job: Job) -> None:
        self._jobs[job] = None
        self._count(job.left)

    def _leave(self, job: Job) -> None:
        del self._jobs[job]
        self._count(-job.left)

    def _count(self, change: int) -> None:
        self._waiting += change
        WAITING.set(self._waiting)
        if self._jobs:
            self._arrived.set()
        else:
            self._arrived.clear()


def _encode(parts: Sequence[Part]) -> tuple[asyncio.Future[Any], asyncio.Event]:
    """What `search_each` takes for the queries of all parts, or why there is none; and when the next may begin."""
    engine, loop, begun = parts[0].job.engine, asyncio.get_running_loop(), asyncio.Event()
    queries = [query for part in parts for query in part.queries]
    tell = partial(loop.call_soon_threadsafe, begun.set)
    done = loop.run_in_executor(engine.encoding, engine.searcher.encode, queries, tell)
    done.add_done_callback(lambda _: begun.set())
    return done, begun


async def _answer(parts: Sequence[Part], vectors: asyncio.Future[Any]) -> None:
    """Search all parts at once and give every job its own; after an error each part by itself."""
    engine = parts[0].job.engine
    queries = [query for part in parts for query in part.queries]
    done: asyncio.Future[Any] = vectors
    if not vectors.exception():
        BATCH.observe(len(queries))
        search = partial(engine.searcher.search_each, queries, vectors.result())
        done = asyncio.get_running_loop().run_in_executor(engine.thread, search)
        await asyncio.wait([done])
    error = done.exception()
    if error is None:
        found = iter(done.result())
        for part in parts:
            _put(part.job, [next(found) for _ in part.queries])
    elif len(parts) > 1:
        for part in parts:
            vectors, _ = _encode([part])
            await asyncio.wait([vectors])
            await _answer([part], vectors)
    elif not parts[0].job.answer.done():
        parts[0].job.answer.set_exception(error)


def _put(job: Job, hits: list[list[Hit]]) -> None:
    job.hits += hits
    if not job.left and not job.answer.done():
        job.answer.set_result(job.hits)


def _give_up(job: Job, within_s: float) -> None:
    if not job.answer.done():
        REJECTIONS.labels("deadline").inc()
        job.answer.set_exception(DeadlinePassed(f"no answer within {within_s:g} s; try again in a moment"))
