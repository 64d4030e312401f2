"""The queue: whatever arrives together, everybody gets its own answer in order, and batches stay within bounds."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.retrieval.batching import BATCH_QUERIES, Batcher, DeadlinePassed, QueueFull
from services.retrieval.query import Query
from shared.records import Hit, Paper


@dataclass
class Echo:
    """Finds for every query the paper that has it as PMID."""

    batches: list[int] = field(default_factory=list)

    def encode(self, queries: Sequence[Query], begun: Callable[[], object]) -> list[str]:
        return [query.text for query in queries]

    def search_each(self, queries: Sequence[Query], vectors: Sequence[str] = ()) -> list[list[Hit]]:
        assert list(vectors) == [query.text for query in queries]
        self.batches.append(len(queries))
        return [[Hit(Paper(query.text, "", ""), 1.0)] for query in queries]


@dataclass(eq=False)
class Engine:
    thread: ThreadPoolExecutor
    encoding: ThreadPoolExecutor
    searcher: Echo = field(default_factory=Echo)


def queries(request: int, count: int) -> list[Query]:
    return [Query(f"{request}/{number}", 1, "dense") for number in range(count)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 1)), max_size=12))
def test_every_request_gets_its_own_answers_in_order_from_its_own_searcher(wanted: list[tuple[int, int]]) -> None:
    async def ask_all(engines: list[Engine]) -> list[list[list[Hit]]]:
        batcher = Batcher(queue_queries=100_000)
        asked = [
            batcher.search(engines[which], queries(number, count), within_s=60)
            for number, (count, which) in enumerate(wanted)
        ]
        worker = asyncio.create_task(batcher.run())
        found = await asyncio.gather(*asked)
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker
        return list(found)

    with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as encoding:
        engines = [Engine(thread, encoding), Engine(thread, encoding)]
        found = asyncio.run(ask_all(engines))
    for number, ((count, _), hits) in enumerate(zip(wanted, found, strict=True)):
        assert [hit.paper.pmid for (hit,) in hits] == [query.text for query in queries(number, count)]
    for which, engine in enumerate(engines):
        assert sum(engine.searcher.batches) == sum(count for count, its in wanted if its == which)
        assert max(engine.searcher.batches, default=0) <= BATCH_QUERIES


class InTurns(Echo):
    """Ends the search of its first batch only when the second one is being encoded."""

    def __init__(self) -> None:
        super().__init__()
        self.second = threading.Event()
        self.encoded = 0

    def encode(self, queries: Sequence[Query], begun: Callable[[], object]) -> list[str]:
        self.encoded += 1
        if self.encoded == 2:
            self.second.set()
        return super().encode(queries, begun)

    def search_each(self, queries: Sequence[Query], vectors: Sequence[str] = ()) -> list[list[Hit]]:
        assert self.second.wait(30)
        return super().search_each(queries, vectors)


def test_the_next_batch_is_encoded_while_one_is_searched() -> None:
    async def ask(engine: Engine) -> None:
        batcher = Batcher(queue_queries=100)
        worker = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher.search(engine, queries(1, 1), within_s=60))
        while not engine.searcher.encoded:  # noqa: ASYNC110 -- seen in another thread only
            await asyncio.sleep(0)
        found = await batcher.search(engine, queries(2, 1), within_s=60)
        assert [hit.paper.pmid for (hit,) in [*await first, *found]] == ["1/0", "2/0"]
        worker.cancel()

    with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as encoding:
        engine = Engine(thread, encoding, InTurns())
        asyncio.run(ask(engine))
    assert engine.searcher.batches == [1, 1]


class Overlaps(Echo):
    """Ends the encoding of its first batch only when that of the second has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.second = threading.Event()
        self.encoded = 0

    def encode(self, queries: Sequence[Query], begun: Callable[[], object]) -> list[str]:
        self.encoded += 1
        if self.encoded == 2:
            self.second.set()
        begun()
        assert self.second.wait(30)
        return super().encode(queries, begun)


def test_the_next_batch_is_encoded_as_soon_as_the_last_of_one_has_begun() -> None:
    async def ask(engine: Engine) -> None:
        batcher = Batcher(queue_queries=100)
        worker = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher.search(engine, queries(1, 1), within_s=60))
        while not engine.searcher.encoded:  # noqa: ASYNC110 -- seen in another thread only
            await asyncio.sleep(0)
        found = await batcher.search(engine, queries(2, 1), within_s=60)
        assert [hit.paper.pmid for (hit,) in [*await first, *found]] == ["1/0", "2/0"]
        worker.cancel()

    with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(2) as encoding:
        engine = Engine(thread, encoding, Overlaps())
        asyncio.run(ask(engine))
    assert engine.searcher.batches == [1, 1]


def test_a_queue_that_nobody_empties_is_full_then_free_again_when_deadlines_pass() -> None:
    async def ask() -> None:
        batcher = Batcher(queue_queries=10)
        with ThreadPoolExecutor(1) as thread:
            engine = Engine(thread, thread)
            waiting = asyncio.create_task(batcher.search(engine, queries(1, 10), within_s=0.05))
            await asyncio.sleep(0)
            with pytest.raises(QueueFull, match="10 queries wait already, at most 10 may"):
                await batcher.search(engine, queries(2, 1), within_s=60)
            with pytest.raises(DeadlinePassed, match=r"within 0\.05 s"):
                await waiting
            with pytest.raises(DeadlinePassed):
                await batcher.search(engine, queries(3, 10), within_s=0.05)

    asyncio.run(ask())
