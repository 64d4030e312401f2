"""One version of what is searched: a searcher, the threads in which it is made and used, and papers it found lately.

Encoder, index and corpus are not thread-safe: they are made, warmed and used in the engine's thread, and in no other,
but for queries that are encoded in threads of their own while those before them are searched.
When nobody refers to an engine any longer, its threads end by themselves and its memory is free.
"""

import asyncio
import contextvars
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog

from services.retrieval.documents import Documents
from services.retrieval.integrity import folders, is_small, verify
from services.retrieval.query import Mode, Query
from services.retrieval.recipe import index_folder
from shared.files import Manifest
from shared.records import Hit, Paper
from shared.settings import Settings

T = TypeVar("T")

MODES: tuple[Mode, ...] = ("dense", "bm25", "hybrid")
WARM_UP = "Does metformin lower mortality in sepsis?"


class Searches(Protocol):
    """What the service needs of a searcher."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def overlaps(self) -> bool: ...

    def encode(self, queries: Sequence[Query], begun: Callable[[], object]) -> Any: ...

    def search_each(self, queries: Sequence[Query], vectors: Any = None) -> list[list[Hit]]: ...

    def similar(self, pmid: str, top_k: int) -> list[Hit] | None: ...

    def find(self, pmid: str) -> Paper | None: ...

    def info(self) -> dict[str, Any]: ...


OpenSearcher = Callable[[Settings], Searches]


@dataclass(frozen=True, eq=False)
class Engine:
    """A searcher that has answered a query. `unverified` are folders whose files have not been hashed yet."""

    searcher: Searches
    thread: Executor
    encoding: Executor
    published: Path | None  # the index's folder behind its link
    unverified: Sequence[Path] = ()
    documents: Documents = field(default_factory=Documents)

    @property
    def version(self) -> str:
        """What tells this index, and with it the corpus, from every other."""
        return self.searcher.manifest.identity

    async def find(self, pmid: str) -> Paper | None:
        """The paper with this PMID, or None."""
        return self.documents.paper(pmid) or await self._call(self.searcher.find, pmid)

    async def papers(self, pmids: Sequence[str]) -> dict[str, Paper]:
        """Those of the papers that there are."""
        found = {pmid: self.documents.paper(pmid) for pmid in pmids}
        missing = [pmid for pmid, paper in found.items() if paper is None]
        if missing:
            fetched = await self._call(lambda: [self.searcher.find(pmid) for pmid in missing])
            found |= zip(missing, fetched, strict=True)
        return {pmid: paper for pmid, paper in found.items() if paper is not None}

    async def similar(self, pmid: str, top_k: int) -> list[Hit] | None:
        """The papers nearest to one, without itself; None when there is no such paper."""
        return await self._call(self.searcher.similar, pmid, top_k)

    async def info(self) -> dict[str, Any]:
        """What the searcher says of itself."""
        return await self._call(self.searcher.info)

    async def _call(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.thread, partial(work, *arguments))


def published(settings: Settings) -> Path | None:
    """The folder of the index that is published now, behind its link."""
    link = index_folder(settings)
    return link.resolve() if link.exists() else None


async def open_engine(settings: Settings, open_searcher: OpenSearcher, *, verify_all: bool) -> Engine:
    """Open, check and warm what is published now, in a thread of its own; raises what keeps it from serving.

    Without `verify_all` much is left to be hashed later, in `unverified`.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="search")
    work = partial(_open, settings, open_searcher, thread, verify_all=verify_all)
    in_context = contextvars.copy_context().run  # log lines of the thread carry service and run, too
    return await asyncio.get_running_loop().run_in_executor(thread, in_context, work)


def _open(settings: Settings, open_searcher: OpenSearcher, thread: Executor, *, verify_all: bool) -> Engine:
    started = time.monotonic()
    log: structlog.stdlib.BoundLogger = structlog.get_logger()
    log.info("loading the index", data=str(settings.storage.data_dir), encoder=settings.retrieval.encoder.model)
    seen = published(settings)
    paths = folders(settings) if seen else []
    now = verify_all or is_small(paths)
    if now:
        verify(paths)
    searcher = open_searcher(settings)
    # The first queries and the first PMID pay for lazy set-up, so nobody else does.
    searcher.search_each([Query.plain(WARM_UP, settings.retrieval)])
    searcher.search_each([Query(WARM_UP, 1, mode, highlight=True) for mode in MODES])
    searcher.find("")
    log.info("ready", seconds=round(time.monotonic() - started, 1), version=searcher.manifest.identity[:12])
    encoding = ThreadPoolExecutor(2 if searcher.overlaps else 1, thread_name_prefix="encode")
    return Engine(searcher, thread, encoding, seen, () if now else paths)
