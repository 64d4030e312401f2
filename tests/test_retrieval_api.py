"""The HTTP interface: wire forms, limits, readiness, back-pressure, and the same answer by every way."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from corpora import publish_corpus
from retrieval_world import PAPERS, needs_minilm, serving, settings_for

from services.retrieval.app import create_app
from services.retrieval.build import build
from services.retrieval.search import Searcher
from services.retrieval.wire import Document, RetrieveReply, SearchReply
from shared.clients import SearchClient
from shared.files import ArtifactError
from shared.records import Hit, Paper
from shared.settings import Settings

QUERIES = [
    "metformin for patients with sepsis",
    "melanoma",
    "Parkinson’s disease & naltrexone: 10 mg/day?",
    "鼻炎 β-carotene 🧬",
    "warfarin " * 150,
    "\x00\tgout\n",
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("data")
    publish_corpus(folder, PAPERS)
    built = settings_for(folder)
    build(built, structlog.get_logger())
    return built


@pytest.fixture(scope="module")
def address(settings: Settings) -> Iterator[str]:
    with serving(create_app(settings)) as url:
        asyncio.run(until_ready(url))
        yield url


@pytest.fixture(scope="module")
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, trust_env=False, timeout=60) as client:
        yield client


async def until_ready(url: str) -> None:
    async with SearchClient(url, patience_s=60) as client:
        await client.call("GET", "/ready")


def flat(hits: Sequence[Hit]) -> list[tuple[str, float]]:
    return [(hit.paper.pmid, pytest.approx(hit.score, abs=1e-5)) for hit in hits]


# ---- the wire forms --------------------------------------------------------------------------------------------------


@needs_minilm
@pytest.mark.parametrize("count", [0, 1, 2, 6])
@pytest.mark.parametrize("scores", [None, False, True])
def test_retrieve_has_the_search_r1_form(http: httpx.Client, count: int, scores: bool | None) -> None:
    body: dict[str, Any] = {"queries": QUERIES[:count], "topk": 2}
    if scores is not None:
        body["return_scores"] = scores
    reply = http.post("/retrieve", json=body)
    assert reply.status_code == 200
    assert reply.json().keys() == {"result"}
    result = reply.json()["result"]
    assert [len(hits) for hits in result] == [2] * count
    for item in (item for hits in result for item in hits):
        if scores:
            assert item.keys() == {"document", "score"}
            assert isinstance(item["score"], float)
        record = item["document"] if scores else item
        assert record == next(p for p in PAPERS if p.pmid == record["pmid"]).as_record()
    RetrieveReply.model_validate(reply.json())


@needs_minilm
@pytest.mark.parametrize("body", [{"queries": ["gout"]}, {"queries": ["gout"], "topk": None}])
def test_retrieve_takes_the_default_number_when_none_is_named(http: httpx.Client, body: dict[str, Any]) -> None:
    assert len(http.post("/retrieve", json=body).json()["result"][0]) == 3


@needs_minilm
def test_search_repeats_each_query_and_gives_its_hits_best_first(http: httpx.Client) -> None:
    reply = http.post("/search", json={"queries": QUERIES, "top_k": 5})
    results = SearchReply.model_validate(reply.json()).results
    assert [result.query for result in results] == QUERIES
    for result in results:
        scores = [hit.score for hit in result.hits]
        assert len(scores) == 5
        assert scores == sorted(scores, reverse=True)
    assert http.post("/search", json={"queries": []}).json() == {"results": []}


@needs_minilm
def test_every_way_gives_the_same_papers_and_scores(settings: Settings, http: httpx.Client) -> None:
    searcher = Searcher(settings)
    batch = searcher.search(QUERIES, 4)
    assert [flat(searcher.search([query], 4)[0]) for query in QUERIES] == [[*map(tuple, flat(h))] for h in batch]
    ways = [
        http.post("/search", json={"queries": QUERIES, "top_k": 4}).json()["results"],
        [http.post("/search", json={"queries": [q], "top_k": 4}).json()["results"][0] for q in QUERIES],
    ]
    for results in ways:
        assert [[(x["document"]["pmid"], x["score"]) for x in r["hits"]] for r in results] == [flat(h) for h in batch]
    retrieved = http.post("/retrieve", json={"queries": QUERIES, "topk": 4, "return_scores": True}).json()["result"]
    assert [[(x["document"]["pmid"], x["score"]) for x in hits] for hits in retrieved] == [flat(h) for h in batch]


@needs_minilm
def test_more_hits_than_papers_gives_every_paper_once(http: httpx.Client) -> None:
    hits = http.post("/search", json={"queries": ["asthma"], "top_k": 100}).json()["results"][0]["hits"]
    assert sorted(hit["document"]["pmid"] for hit in hits) == sorted(paper.pmid for paper in PAPERS)


@needs_minilm
def test_a_paper_is_found_by_its_pmid_and_an_unknown_one_is_404(http: httpx.Client) -> None:
    reply = http.get(f"/documents/{PAPERS[7].pmid}")
    assert reply.json() == PAPERS[7].as_record()
    Document.model_validate(reply.json())
    missing = http.get("/documents/99999999")
    assert missing.status_code == 404
    assert missing.json() == {"detail": "no paper with PMID 99999999 in this corpus"}


# ---- limits ----------------------------------------------------------------------------------------------------------


@needs_minilm
@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (path, body, field)
        for path, k in (("/search", "top_k"), ("/retrieve", "topk"))
        for body, field in (
            ({"queries": [""]}, "queries"),
            ({"queries": ["gout", " \t\n\u3000"]}, "queries"),
            ({"queries": ["x" * 2001]}, "queries"),
            ({"queries": ["x"] * 513}, "queries"),
            ({"queries": "gout"}, "queries"),
            ({"queries": [7]}, "queries"),
            ({}, "queries"),
            ({"queries": ["gout"], k: 0}, k),
            ({"queries": ["gout"], k: -1}, k),
            ({"queries": ["gout"], k: 10_000}, k),
            ({"queries": ["gout"], k: "many"}, k),
            ({"queries": ["gout"], "colour": "red"}, "colour"),
        )
    ],
)
def test_a_wrong_request_is_422_and_names_the_field(http: httpx.Client, path: str, body: Any, field: str) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code == 422
    assert {item["loc"][1] for item in reply.json()["detail"]} == {field}


@needs_minilm
@pytest.mark.parametrize(
    ("content", "status"),
    [
        ('{"queries": ["\\ud800"]}', 422),
        ('{"queries": ["gout"], "top_k": NaN}', 422),
        ('{"queries": ["gout"], "top_k": 1e999}', 422),
        ("{", 422),
        ("[" * 100_000, 400),
        (b"\xff\xfe", 422),
    ],
)
def test_a_broken_body_is_refused_with_a_detail(http: httpx.Client, content: str | bytes, status: int) -> None:
    reply = http.post("/search", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status
    assert reply.json()["detail"]


@needs_minilm
def test_openapi_states_the_limits_and_the_metrics_name_the_routes(http: httpx.Client) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    queries = schemas["SearchRequest"]["properties"]["queries"]
    assert (queries["maxItems"], queries["items"]["maxLength"]) == (512, 2000)
    assert schemas["SearchRequest"]["additionalProperties"] is False
    assert http.get("/docs").status_code == 200
    http.get("/documents/1")
    text = http.get("/metrics").text
    assert 'drzero_retrieval_requests_total{route="/documents/{pmid}",status="404"}' in text
    assert f'drzero_retrieval_corpus_records{{count="kept"}} {len(PAPERS)}.0' in text
    for stage in ("encode", "search", "fetch"):
        assert f'drzero_retrieval_stage_seconds_count{{stage="{stage}"}}' in text


@needs_minilm
def test_64_clients_at_once_get_their_own_answers(address: str) -> None:
    async def client(number: int) -> list[tuple[str, str]]:
        async with SearchClient(address, patience_s=60) as search:
            pairs = []
            for turn in range(3):
                paper = PAPERS[(number + 24 * turn) % len(PAPERS)]
                ((best, *_),) = await search.search([paper.text], 1 + number % 4)
                pairs.append((paper.pmid, best.paper.pmid))
            return pairs

    async def everybody() -> list[list[tuple[str, str]]]:
        return await asyncio.gather(*(client(number) for number in range(64)))

    pairs = [pair for pairs in asyncio.run(everybody()) for pair in pairs]
    assert len(pairs) == 192
    assert all(asked == found for asked, found in pairs)


# ---- readiness and back-pressure, on a searcher that waits for the test ----------------------------------------------


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class SlowSearcher:
    """Answers each query with the paper whose PMID it is, when the test lets it."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.batches: list[list[str]] = []

    def search_each(self, queries: Sequence[str], top_ks: Sequence[int]) -> list[list[Hit]]:
        if list(queries) != ["ready"]:
            self.batches.append(list(queries))
            self.entered.set()
            assert self.go.wait(30)
        if "defect" in queries:
            raise ArithmeticError("a defect")
        return [[Hit(Paper(query, "", ""), 1.0)] * k for query, k in zip(queries, top_ks, strict=True)]

    def find(self, pmid: str) -> Paper | None:
        return None


@asynccontextmanager
async def in_process(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


async def until(client: httpx.AsyncClient, path: str, wanted: str) -> None:
    async with asyncio.timeout(30):
        while wanted not in (await client.get(path)).text:  # noqa: ASYNC110 -- seen over HTTP only
            await asyncio.sleep(0)


def pmids(reply: httpx.Response) -> list[str]:
    return [result["hits"][0]["document"]["pmid"] for result in reply.json()["results"]]


@pytest.mark.anyio
async def test_ready_says_why_not_until_the_index_is_loaded(tmp_path: Path) -> None:
    load = threading.Event()

    def open_searcher(_: Settings) -> SlowSearcher:
        assert load.wait(30)
        return SlowSearcher()

    async with in_process(create_app(settings_for(tmp_path), open_searcher=open_searcher)) as client:
        assert (await client.get("/health")).status_code == 200
        for reply in (
            await client.get("/ready"),
            await client.post("/search", json={"queries": ["1"]}),
            await client.get("/documents/1"),
        ):
            assert reply.status_code == 503
            assert reply.json() == {"detail": "not ready: the index is being loaded"}
            assert reply.headers["retry-after"] == "1"
        load.set()
        await until(client, "/ready", '"ready"')
        assert (await client.get("/ready")).status_code == 200


@pytest.mark.anyio
async def test_a_searcher_that_cannot_open_is_reported_once_and_never_ready(tmp_path: Path) -> None:
    def open_searcher(_: Settings) -> SlowSearcher:
        raise ArtifactError("index made from another corpus")

    heard: list[BaseException] = []
    app = create_app(settings_for(tmp_path), open_searcher=open_searcher, on_failure=heard.append)
    async with in_process(app) as client:
        await until(client, "/ready", "failed: index made from another corpus")
        assert (await client.get("/ready")).status_code == 503
    assert [str(error) for error in heard] == ["index made from another corpus"]


@pytest.mark.anyio
async def test_a_full_queue_is_503_with_retry_after_and_nobody_in_it_is_lost(tmp_path: Path) -> None:
    searcher = SlowSearcher()
    app = create_app(settings_for(tmp_path, RETRIEVAL__QUEUE_QUERIES="3"), open_searcher=lambda _: searcher)
    async with in_process(app) as client, asyncio.TaskGroup() as group:
        await until(client, "/ready", '"ready"')
        asked = [["1"], ["2", "3"], ["4"]]
        running = [group.create_task(client.post("/search", json={"queries": asked[0], "top_k": 1}))]
        await asyncio.to_thread(searcher.entered.wait, 30)
        running += [group.create_task(client.post("/search", json={"queries": q, "top_k": 2})) for q in asked[1:]]
        await until(client, "/metrics", "drzero_retrieval_queue_queries 3.0")
        refused = await client.post("/search", json={"queries": ["5"]})
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert "3 queries wait already" in refused.json()["detail"]
        searcher.go.set()
        assert [pmids(await task) for task in running] == asked
        assert pmids(await client.post("/search", json={"queries": ["6"]})) == ["6"]
    assert searcher.batches == [["1"], ["2", "3", "4"], ["6"]]


@pytest.mark.anyio
async def test_a_request_longer_than_the_queue_is_answered_when_nobody_waits(tmp_path: Path) -> None:
    searcher = SlowSearcher()
    searcher.go.set()
    app = create_app(settings_for(tmp_path, RETRIEVAL__QUEUE_QUERIES="3"), open_searcher=lambda _: searcher)
    async with in_process(app) as client:
        await until(client, "/ready", '"ready"')
        many = [str(number) for number in range(400)]
        assert pmids(await client.post("/search", json={"queries": many})) == many


@pytest.mark.anyio
async def test_a_defect_in_one_batch_is_500_there_and_the_next_batch_is_answered(tmp_path: Path) -> None:
    searcher = SlowSearcher()
    searcher.go.set()
    async with in_process(create_app(settings_for(tmp_path), open_searcher=lambda _: searcher)) as client:
        await until(client, "/ready", '"ready"')
        failed = await client.post("/search", json={"queries": ["defect"]})
        assert failed.status_code == 500
        assert failed.json() == {"detail": "the search failed; the service's log says why"}
        assert pmids(await client.post("/search", json={"queries": ["7"]})) == ["7"]
