"""Micro-batching: requests that wait together are encoded and searched together, by one thread.

An asyncio task takes everything that waits (up to a number of queries), has it answered in the search thread and hands
each request its own part. An idle service answers at once: there is no waiting window. The queue is bounded in
queries; when it is full, `QueueFull` tells the caller to come back. Searching twice at once never happens.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from prometheus_client import Gauge, Histogram

from shared.metrics import REGISTRY, SECONDS
from shared.records import Hit

BATCH_QUERIES = 256  # a longer batch makes everybody wait longer and is hardly faster per query

SearchEach = Callable[[Sequence[str], Sequence[int]], list[list[Hit]]]

WAITING = Gauge("drzero_retrieval_queue_queries", "Queries that wait for the search thread.", registry=REGISTRY)
BATCH = Histogram(
    "drzero_retrieval_batch_queries",
    "Queries answered together.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    registry=REGISTRY,
)
WAIT_SECONDS = Histogram(
    "drzero_retrieval_queue_seconds", "Time a request waits for the search thread.", buckets=SECONDS, registry=REGISTRY
)


class QueueFull(RuntimeError):
    """More queries wait than the service accepts; the same request may succeed a moment later."""


@dataclass(frozen=True)
class Job:
    """One request in the queue."""

    queries: Sequence[str]
    top_k: int
    answer: asyncio.Future[list[list[Hit]]]
    since: float


class Batcher:
    """The queue and its one worker. Lives in one event loop; `run()` must be running for answers to come."""

    def __init__(self, thread: Executor, *, queue_queries: int) -> None:
        self._thread = thread
        self._limit = queue_queries
        self._jobs: deque[Job] = deque()
        self._waiting = 0
        self._arrived = asyncio.Event()

    async def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """Hits per query, best first; raises QueueFull.

        A request that is by itself above the limit is taken when nothing else waits.
        """
        if not queries:
            return []
        if self._waiting and self._waiting + len(queries) > self._limit:
            raise QueueFull(f"{self._waiting} queries wait already, at most {self._limit} may; try again in a moment")
        loop = asyncio.get_running_loop()
        job = Job(queries, top_k, loop.create_future(), loop.time())
        self._jobs.append(job)
        self._count(len(queries))
        self._arrived.set()
        return await job.answer

    async def run(self, search_each: SearchEach) -> None:
        """Answer batch after batch, until cancelled. An error of a batch goes to the requests in it."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            jobs = self._take()
            queries = [query for job in jobs for query in job.queries]
            if not queries:
                continue
            top_ks = [job.top_k for job in jobs for _ in job.queries]
            BATCH.observe(len(queries))
            for job in jobs:
                WAIT_SECONDS.observe(loop.time() - job.since)
            done = loop.run_in_executor(self._thread, search_each, queries, top_ks)
            await asyncio.wait([done])
            _hand_out(jobs, done)

    def _take(self) -> list[Job]:
        """The jobs of the next batch: at least one, then as many as fit; abandoned ones are dropped."""
        jobs: list[Job] = []
        size = 0
        while self._jobs and (not jobs or size + len(self._jobs[0].queries) <= BATCH_QUERIES):
            job = self._jobs.popleft()
            self._count(-len(job.queries))
            if not job.answer.cancelled():
                jobs.append(job)
                size += len(job.queries)
        if not self._jobs:
            self._arrived.clear()
        return jobs

    def _count(self, change: int) -> None:
        self._waiting += change
        WAITING.set(self._waiting)


def _hand_out(jobs: Sequence[Job], done: asyncio.Future[list[list[Hit]]]) -> None:
    """Give every job its part of a finished batch, or the batch's error."""
    error = done.exception()
    first = 0
    for job in jobs:
        last = first + len(job.queries)
        if not job.answer.done():
            if error is None:
                job.answer.set_result(done.result()[first:last])
            else:
                job.answer.set_exception(error)
        first = last
