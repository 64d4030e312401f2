"""The search service without HTTP: loads in the background, answers through one thread, knows whether it is ready.

    starting → (searcher opened, one query answered) → ready
             ↘ failed: `on_failure(error)` is called, once; the owner of the process ends it

Encoder, index and corpus are made, warmed and used in the one search thread, and in no other.
"""

import asyncio
import contextvars
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import structlog

from services.retrieval.batching import Batcher
from services.retrieval.search import Searcher
from shared.records import Hit, Paper
from shared.settings import Settings


class Searches(Protocol):
    """What the service needs of a searcher."""

    def search_each(self, queries: Sequence[str], top_ks: Sequence[int]) -> list[list[Hit]]: ...

    def find(self, pmid: str) -> Paper | None: ...


OpenSearcher = Callable[[Settings], Searches]


class NotReady(RuntimeError):
    """The service cannot answer yet; the text says why."""


class SearchService:
    """One searcher and its thread. Use `start()` and `stop()` in the event loop that serves."""

    def __init__(
        self,
        settings: Settings,
        *,
        open_searcher: OpenSearcher = Searcher,
        on_failure: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._open = open_searcher
        self._on_failure = on_failure
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._batcher = Batcher(self._thread, queue_queries=settings.retrieval.queue_queries)
        self._searcher: Searches | None = None
        self._life: asyncio.Task[None] | None = None
        self.not_ready: str | None = "the index is being loaded"  # None when ready
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger()

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._life = asyncio.create_task(self._live())
        self._life.add_done_callback(self._ended)

    def stop(self) -> None:
        """Stop answering; a batch that is being searched is finished, its result dropped."""
        if self._life is not None:
            self._life.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        """Hits per query, best first; raises NotReady or batching.QueueFull."""
        self._require_searcher()
        return await self._batcher.search(queries, top_k)

    async def find(self, pmid: str) -> Paper | None:
        """The paper with this PMID, or None; raises NotReady."""
        searcher = self._require_searcher()
        return await asyncio.get_running_loop().run_in_executor(self._thread, searcher.find, pmid)

    def _require_searcher(self) -> Searches:
        if self.not_ready is not None or self._searcher is None:
            raise NotReady(f"not ready: {self.not_ready}")
        return self._searcher

    async def _live(self) -> None:
        in_context = contextvars.copy_context().run  # log lines of the thread carry service and run, too
        searcher = await asyncio.get_running_loop().run_in_executor(self._thread, in_context, self._load)
        self._searcher, self.not_ready = searcher, None
        await self._batcher.run(searcher.search_each)

    def _load(self) -> Searches:
        started = time.monotonic()
        self._log.info(
            "loading the index",
            data=str(self._settings.storage.data_dir),
            encoder=self._settings.retrieval.encoder.model,
        )
        searcher = self._open(self._settings)
        # The first query and the first PMID pay for lazy set-up, so nobody else does.
        searcher.search_each(["ready"], [1])
        searcher.find("")
        self._log.info("ready", seconds=round(time.monotonic() - started, 1))
        return searcher

    def _ended(self, life: asyncio.Task[None]) -> None:
        error = None if life.cancelled() else life.exception()
        self.not_ready = "stopped" if error is None else f"failed: {error}"
        if error is not None:
            self._on_failure(error)
