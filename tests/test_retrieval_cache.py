"""Results in Redis: found again, told apart, and no obstacle when Redis is away, slow or dies in the middle."""

import asyncio
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from retrieval_world import PAPERS, WordSearcher, in_process, settings_for, until

from services.retrieval import cache as cache_module
from services.retrieval.app import create_app
from services.retrieval.cache import canonical, shape_of
from services.retrieval.query import Filters, Query
from shared.metrics import REGISTRY
from shared.settings import RetrievalSettings

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server on the path")

ASK = {"queries": ["metformin in sepsis", "gout"], "top_k": 2}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextmanager
def redis_at(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    command = ["redis-server", "--port", "0", "--unixsocket", str(folder / "redis.sock"), "--save", ""]
    with subprocess.Popen([*command, "--dir", str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert any("eady to accept connections" in line for line in process.stdout)
        try:
            yield process
        finally:
            process.kill()


@asynccontextmanager
async def service(folder: Path, searcher: WordSearcher, **more: str) -> AsyncIterator[httpx.AsyncClient]:
    settings = settings_for(folder, **{"REDIS__URL": f"unix://{folder}/redis.sock"} | more)
    async with in_process(create_app(settings, open_searcher=lambda _: searcher)) as client:
        await until(client, "/ready", '"ready"')
        yield client


def lookups(outcome: str) -> float:
    return REGISTRY.get_sample_value("drzero_retrieval_cache_lookups_total", {"outcome": outcome}) or 0.0


async def ask(client: httpx.AsyncClient, body: dict[str, Any] = ASK) -> Any:
    reply = await client.post("/search", json=body)
    assert reply.status_code == 200
    return reply.json()


async def ask_until_kept(client: httpx.AsyncClient, searcher: WordSearcher) -> None:
    """Ask the same until the searcher is not asked any more: results are written after the reply."""
    async with asyncio.timeout(10):
        while True:
            before = len(searcher.asked)
            await ask(client)
            if len(searcher.asked) == before:
                return


@needs_redis
@pytest.mark.anyio
async def test_a_kept_result_is_the_searched_one_to_the_byte_and_is_shared_by_copies(tmp_path: Path) -> None:
    one, two = WordSearcher(), WordSearcher()
    with redis_at(tmp_path):
        async with service(tmp_path, one) as client:
            searched = (await client.post("/search", json=ASK)).content
            await ask_until_kept(client, one)
            assert (await client.post("/search", json=ASK)).content == searched
        async with service(tmp_path, two) as client:
            hits = lookups("hit")
            assert (await client.post("/search", json=ASK)).content == searched
            assert lookups("hit") == hits + 2
            mixed = await ask(client, {"queries": ["asthma", "gout"], "top_k": 2})
    assert [query.text for query in two.asked] == ["asthma"]
    assert [result["query"] for result in mixed["results"]] == ["asthma", "gout"]


@needs_redis
@pytest.mark.anyio
async def test_another_index_another_wish_or_another_ranking_is_searched_anew(tmp_path: Path) -> None:
    first = WordSearcher()
    with redis_at(tmp_path):
        async with service(tmp_path, first) as client:
            await ask_until_kept(client, first)
            before = len(first.asked)
            for more in ({"top_k": 3}, {"mode": "dense"}, {"highlight": True}, {"filters": {"year_from": 1}}):
                await ask(client, ASK | more)
            assert len(first.asked) == before + 8
        newer, weighted = WordSearcher(PAPERS[:9], "two"), WordSearcher()
        async with service(tmp_path, newer) as client:
            await ask(client)
        async with service(tmp_path, weighted, RETRIEVAL__DENSE_SHARE="0.3") as client:
            await ask(client)
        off = WordSearcher()
        async with service(tmp_path, off, RETRIEVAL__CACHE="false") as client:
            await ask(client)
    assert [len(searcher.asked) for searcher in (newer, weighted, off)] == [2, 2, 2]


@needs_redis
@pytest.mark.anyio
async def test_redis_killed_in_the_middle_is_told_once_and_costs_no_answer_and_its_return_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = WordSearcher()
    monkeypatch.setattr(cache_module, "AGAIN_S", 1.0)
    async with service(tmp_path, searcher) as client:
        with redis_at(tmp_path) as process:
            await ask_until_kept(client, searcher)
            process.kill()
            process.wait()
            replies = await asyncio.gather(*(ask(client) for _ in range(20)))
        assert all(reply == replies[0] for reply in replies)
        assert REGISTRY.get_sample_value("drzero_retrieval_cache_up") == 0
        errors = lookups("error")
        await ask(client)
        assert lookups("error") == errors + 2
        with redis_at(tmp_path):
            await ask_until_kept(client, searcher)
        assert REGISTRY.get_sample_value("drzero_retrieval_cache_up") == 1
    told = capsys.readouterr().out
    assert told.count("redis does not answer") == 1
    assert told.count("redis answers again") == 1


@pytest.mark.anyio
async def test_a_redis_that_accepts_and_says_nothing_delays_once_by_its_timeout(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        searcher = WordSearcher()
        async with service(tmp_path, searcher, REDIS__URL=url, REDIS__TIMEOUT_S="0.2") as client:
            loop = asyncio.get_running_loop()
            started = loop.time()
            for _ in range(20):
                await ask(client)
            assert loop.time() - started < 5 * 0.2
    assert len(searcher.asked) == 40


NAMES = st.lists(st.text(max_size=5), max_size=3).map(tuple)
FILTERS = st.builds(Filters, st.none() | st.integers(0, 9), st.none(), NAMES, NAMES, NAMES)
QUERIES = st.builds(
    Query, st.text(max_size=3), st.integers(1, 3), st.sampled_from(["dense", "bm25"]), st.booleans(), filters=FILTERS
)


@given(QUERIES, QUERIES)
def test_queries_share_a_result_only_when_they_ask_for_the_same(one: Query, two: Query) -> None:
    if canonical(one) == canonical(two):
        assert (one.text, one.top_k, one.mode, one.rerank) == (two.text, two.top_k, two.mode, two.rerank)
        assert {name.casefold() for name in one.filters.journals} == {name.casefold() for name in two.filters.journals}


def test_order_case_and_repetition_of_names_in_a_filter_make_no_other_query() -> None:
    one = Query("x", 1, "dense", filters=Filters(journals=("Lancet", "BMJ")))
    two = Query("x", 1, "dense", filters=Filters(journals=("bmj", "LANCET", "bmj")))
    assert canonical(one) == canonical(two)


def test_only_settings_that_shape_a_ranking_tell_results_apart() -> None:
    plain = RetrievalSettings()
    assert shape_of(plain) == shape_of(plain.model_copy(update={"port": 9, "queue_queries": 1, "top_k": 9}))
    assert shape_of(plain) != shape_of(plain.model_copy(update={"fusion": "ranks"}))
