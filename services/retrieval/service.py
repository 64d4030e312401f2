"""The search service without HTTP: loads in the background, answers in batches, takes up a newly published index.

    starting → (searcher opened, one query answered) → ready
             ↘ failed: `on_failure(error)` is called, once; the owner of the process ends it

While it is ready it looks every `retrieval.watch_s` for another published index, opens that beside the one in use and
puts it in its place; requests that are under way keep theirs. One that cannot be opened is told and left alone, and
the old one goes on.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import structlog
from prometheus_client import Counter, Gauge

from services.retrieval.batching import REJECTIONS, Batcher, DeadlinePassed, QueueFull
from services.retrieval.cache import Cache, Found, make_cache
from services.retrieval.engine import Engine, OpenSearcher, open_engine, published
from services.retrieval.integrity import verify
from services.retrieval.query import Query
from shared.metrics import REGISTRY, from_zero
from shared.records import Hit, Paper
from shared.settings import Settings

RELOADS = Counter(
    "drzero_retrieval_reloads_total",
    "Published indexes taken up while serving, by outcome.",
    ["outcome"],
    registry=REGISTRY,
)
from_zero(RELOADS, "done", "failed")
VERSION = Gauge(
    "drzero_retrieval_index_info", "The version of the index in use, as a label.", ["version"], registry=REGISTRY
)


class NotReady(RuntimeError):
    """The service cannot answer yet; the text says why."""


class SearchService:
    """The engine in use and the queue. Use `start()` and `stop()` in the event loop that serves."""

    def __init__(
        self,
        settings: Settings,
        *,
        open_searcher: OpenSearcher,
        on_failure: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._open = open_searcher
        self._on_failure = on_failure
        self._batcher = Batcher(queue_queries=settings.retrieval.queue_queries)
        self._cache = make_cache(settings)
        self._engine: Engine | None = None
        self._calls = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.not_ready: str | None = "the index is being loaded"  # None when ready
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger()

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._begin(self._live()).add_done_callback(self._ended)

    async def stop(self) -> None:
        """Stop answering; a batch that is being searched is finished, its result dropped."""
        for task in self._tasks:
            task.cancel()
        if self._engine is not None:
            for thread in (self._engine.encoding, self._engine.thread):
                thread.shutdown(wait=False, cancel_futures=True)
        if self._cache is not None:
            await self._cache.close()

    @property
    def engine(self) -> Engine:
        """What is in use now, to be asked throughout one request; raises NotReady."""
        if self.not_ready is not None or self._engine is None:
            REJECTIONS.labels("not ready").inc()
            raise NotReady(f"not ready: {self.not_ready}")
        return self._engine

    async def search(
        self, engine: Engine, queries: Sequence[Query], *, within_s: float | None = None
    ) -> list[list[Hit]]:
        """Hits per query, best first; raises batching.QueueFull or batching.DeadlinePassed."""
        within_s = self._settings.retrieval.deadline_s if within_s is None else within_s
        if self._cache is None or not queries:
            return await self._batcher.search(engine, queries, within_s=within_s)
        kept = await _kept(self._cache, engine, queries)
        missing = [query for query, hits in zip(queries, kept, strict=True) if hits is None]
        searched = await self._batcher.search(engine, missing, within_s=within_s)
        if missing:
            self._begin(self._cache.put(engine.version, missing, searched))
        fresh = iter(searched)
        return [next(fresh) if hits is None else hits for hits in kept]

    async def find(self, engine: Engine, pmid: str) -> Paper | None:
        """The paper with this PMID, or None; raises as `search` does."""
        async with self._call():
            return await engine.find(pmid)

    async def similar(self, engine: Engine, pmid: str, top_k: int) -> list[Hit] | None:
        """The papers nearest to one, without itself; None when there is no such paper; raises as `search` does."""
        async with self._call():
            return await engine.similar(pmid, top_k)

    async def info(self, engine: Engine) -> dict[str, Any]:
        """What the searcher says of itself; raises as `search` does."""
        async with self._call():
            return await engine.info()

    @asynccontextmanager
    async def _call(self) -> AsyncIterator[None]:
        """Bounds in number and time what goes to the search thread beside the queue."""
        if self._calls >= self._settings.retrieval.queue_queries:
            REJECTIONS.labels("queue full").inc()
            raise QueueFull(f"{self._calls} requests wait already; try again in a moment")
        self._calls += 1
        within_s = self._settings.retrieval.deadline_s
        try:
            async with asyncio.timeout(within_s):
                yield
        except TimeoutError as error:
            REJECTIONS.labels("deadline").inc()
            raise DeadlinePassed(f"no answer within {within_s:g} s; try again in a moment") from error
        finally:
            self._calls -= 1

    async def _live(self) -> None:
        self._take_up(await open_engine(self._settings, self._open, verify_all=False))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._batcher.run())
            group.create_task(self._watch())
            group.create_task(self._verify_later())

    def _take_up(self, engine: Engine) -> None:
        self._engine, self.not_ready = engine, None
        VERSION.clear()
        VERSION.labels(engine.version[:12]).set(1)

    async def _verify_later(self) -> None:
        """Hash what was too much for the start; raises ArtifactError, which ends the service."""
        if self._engine is not None and self._engine.unverified:
            await asyncio.to_thread(verify, list(self._engine.unverified))

    async def _watch(self) -> None:
        """Take up what is published, as long as the service lives."""
        seen = self.engine.published
        while self._settings.retrieval.watch_s:
            await asyncio.sleep(self._settings.retrieval.watch_s)
            now = await asyncio.to_thread(published, self._settings)
            if now is not None and now != seen:
                seen = now  # one that fails is not tried again
                await self._reload()

    async def _reload(self) -> None:
        opening = asyncio.ensure_future(open_engine(self._settings, self._open, verify_all=True))
        await asyncio.wait([opening])
        error = opening.exception()
        RELOADS.labels("failed" if error else "done").inc()
        if error is not None:
            self._log.warning("the newly published index cannot be used; the old one stays", error=str(error))
            return
        self._take_up(opening.result())
        self._log.info("the newly published index is in use", version=opening.result().version[:12])

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _ended(self, life: asyncio.Task[None]) -> None:
        error = None if life.cancelled() else life.exception()
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self.not_ready = "stopped" if error is None else f"failed: {error}"
        if error is not None:
            self._on_failure(error)


async def _kept(cache: Cache, engine: Engine, queries: Sequence[Query]) -> list[list[Hit] | None]:
    """What the cache has of each query, with the papers."""
    found = await cache.get(engine.version, queries)
    papers = await engine.papers([one.pmid for hits in found if hits for one in hits])
    return [_with_papers(hits, papers) for hits in found]


def _with_papers(found: Sequence[Found] | None, papers: dict[str, Paper]) -> list[Hit] | None:
    """The hits of a kept result; None when there is none, or when a paper of it is not to be had."""
    if found is None or any(one.pmid not in papers for one in found):
        return None
    return [one.hit(papers[one.pmid]) for one in found]
