"""The HTTP interface: wire forms, limits, readiness, back-pressure, and the same answer by every way."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from corpora import publish_corpus
from retrieval_world import (
    PAPERS,
    SlowSearcher,
    WordSearcher,
    in_process,
    needs_minilm,
    serving,
    settings_for,
    until,
    until_ready,
)

from services.retrieval.app import create_app
from services.retrieval.build import build
from services.retrieval.query import Filters, Query
from services.retrieval.search import Searcher
from services.retrieval.wire import Document, Info, Problem, RetrieveReply, SearchReply, SimilarReply
from shared.clients import SearchClient
from shared.files import ArtifactError
from shared.records import Hit
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


def flat(hits: Sequence[Hit]) -> list[tuple[str, Any]]:
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
    assert missing.json()["detail"] == "no paper with PMID 99999999 in this corpus"


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
        ("[" * 100_000, 422),
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
    for stage in ("encode", "search", "words", "fuse", "fetch"):
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


def pmids(reply: httpx.Response) -> list[str]:
    return [result["hits"][0]["document"]["pmid"] for result in reply.json()["results"]]


@pytest.mark.anyio
async def test_ready_says_why_not_until_the_index_is_loaded(tmp_path: Path) -> None:
    load = threading.Event()

    def open_searcher(_: Settings) -> WordSearcher:
        assert load.wait(30)
        return WordSearcher()

    async with in_process(create_app(settings_for(tmp_path), open_searcher=open_searcher)) as client:
        assert (await client.get("/health")).status_code == 200
        for reply in (
            await client.get("/ready"),
            await client.post("/search", json={"queries": ["1"]}),
            await client.get("/documents/1"),
        ):
            assert reply.status_code == 503
            assert reply.json()["detail"] == "not ready: the index is being loaded"
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
        assert failed.json()["detail"] == "the search failed; the service's log says why"
        assert pmids(await client.post("/search", json={"queries": ["7"]})) == ["7"]


# ---- what a request may ask for --------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_everything_asked_for_reaches_the_searcher_and_its_answer_the_client(tmp_path: Path) -> None:
    searcher = WordSearcher()
    body = {
        "queries": ["gout"],
        "top_k": 2,
        "mode": "bm25",
        "highlight": True,
        "filters": {"year_from": 2000, "journals": ["Lancet", "BMJ"], "publication_types": ["Review"]},
    }
    async with in_process(create_app(settings_for(tmp_path), open_searcher=lambda _: searcher)) as client:
        await until(client, "/ready", '"ready"')
        reply = await client.post("/search", json=body)
        plain = await client.post("/search", json={"queries": ["gout"], "top_k": 1})
    filters = Filters(year_from=2000, journals=("Lancet", "BMJ"), publication_types=("Review",))
    assert searcher.asked[0] == Query("gout", 2, "bm25", highlight=True, filters=filters)
    hits = reply.json()["results"][0]["hits"]
    best = next(paper for paper in PAPERS if "gout" in paper.text)
    assert hits[0] == {
        "score": 1 / 7,
        "dense": None,
        "bm25": 1.0,
        "highlight": best.abstract,
        "document": best.as_record(),
    }
    assert plain.json()["results"][0]["hits"][0]["highlight"] is None


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"mode": "both"}, "mode"),
        ({"rerank": True}, "rerank"),
        ({"highlight": "yes"}, "highlight"),
        ({"filters": {"year": 2000}}, "filters"),
        ({"filters": {"journals": ["x" * 301]}}, "filters"),
        ({"filters": {"journals": ["x"] * 101}}, "filters"),
        ({"top_k": "3"}, "top_k"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": 31}, "deadline_s"),
    ],
)
async def test_a_wrong_wish_is_422_and_names_the_field(tmp_path: Path, more: dict[str, Any], field: str) -> None:
    async with in_process(create_app(settings_for(tmp_path), open_searcher=lambda _: WordSearcher())) as client:
        await until(client, "/ready", '"ready"')
        reply = await client.post("/search", json={"queries": ["gout"], **more})
    assert reply.status_code == 422
    assert {item["loc"][1] for item in reply.json()["detail"]} == {field}


@pytest.mark.anyio
async def test_similar_papers_and_the_searcher_itself_can_be_asked_about(tmp_path: Path) -> None:
    async with in_process(create_app(settings_for(tmp_path), open_searcher=lambda _: WordSearcher())) as client:
        await until(client, "/ready", '"ready"')
        similar = SimilarReply.model_validate((await client.get("/similar/1003?top_k=2")).json())
        assert [hit.document.pmid for hit in similar.hits] == ["1000", "1001"]
        assert (await client.get("/similar/7")).status_code == 404
        assert (await client.get("/similar/1003?top_k=0")).json()["detail"][0]["loc"] == ["query", "top_k"]
        info = Info.model_validate((await client.get("/info")).json())
        assert info.version == WordSearcher().manifest.identity
        assert info.limits["max_queries"] == 512
        assert info.defaults["mode"] == "hybrid"
        assert info.searcher == {"device": "none"}


# ---- errors, ids, sizes ----------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_every_error_has_one_shape_and_the_request_id_that_was_sent(tmp_path: Path) -> None:
    searcher = SlowSearcher()
    searcher.go.set()
    async with in_process(create_app(settings_for(tmp_path), open_searcher=lambda _: searcher)) as client:
        early = await client.post("/search", json={"queries": ["1"]}, headers={"X-Request-ID": "mine-1"})
        await until(client, "/ready", '"ready"')
        replies = [
            early,
            await client.get("/nothing", headers={"X-Request-ID": "mine-1"}),
            await client.get("/search", headers={"X-Request-ID": "mine-1"}),
            await client.get("/documents/7", headers={"X-Request-ID": "mine-1"}),
            await client.post("/search", json={}, headers={"X-Request-ID": "mine-1"}),
            await client.post("/search", json={"queries": ["defect"]}, headers={"X-Request-ID": "mine-1"}),
            await client.post("/search", content=b" " * 13_000_000, headers={"X-Request-ID": "mine-1"}),
        ]
    assert [reply.status_code for reply in replies] == [503, 404, 405, 404, 422, 500, 413]
    for reply in replies:
        assert Problem.model_validate(reply.json()).request_id == "mine-1"
        assert reply.headers["x-request-id"] == "mine-1"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.json().keys() == {"detail", "request_id"}


@pytest.mark.anyio
@pytest.mark.parametrize("given", ["", "a b", "<script>", "x" * 65])
async def test_a_request_without_a_usable_id_gets_one_of_its_own(tmp_path: Path, given: str) -> None:
    async with in_process(create_app(settings_for(tmp_path), open_searcher=lambda _: WordSearcher())) as client:
        ids = [(await client.get("/health", headers={"X-Request-ID": given})).headers["x-request-id"] for _ in "ab"]
    assert len({given, *ids}) == 3


@pytest.mark.anyio
async def test_a_body_of_untold_length_is_refused_once_it_is_too_long(tmp_path: Path) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b" " * 1_000_000

    async with in_process(create_app(settings_for(tmp_path), open_searcher=lambda _: WordSearcher())) as client:
        reply = await client.post("/search", content=endless())
    assert reply.status_code == 413
    assert sent < 20


# ---- deadlines, clients that go, fairness ----------------------------------------------------------------------------


@pytest.mark.anyio
async def test_whoever_waits_longer_than_the_deadline_hears_503_and_leaves_the_queue(tmp_path: Path) -> None:
    searcher = SlowSearcher()
    async with in_process(create_app(settings_for(tmp_path), open_searcher=lambda _: searcher)) as client:
        await until(client, "/ready", '"ready"')
        async with asyncio.TaskGroup() as group:
            first = group.create_task(client.post("/search", json={"queries": ["1"]}))
            await asyncio.to_thread(searcher.entered.wait, 30)
            late = await client.post("/search", json={"queries": ["2"], "deadline_s": 0.01})
            assert late.status_code == 503
            assert late.headers["retry-after"] == "1"
            assert "no answer within 0.01 s" in late.json()["detail"]
            await until(client, "/metrics", "drzero_retrieval_queue_queries 0.0")
            searcher.go.set()
        assert first.result().status_code == 200
    assert searcher.batches == [["1"]]


@pytest.mark.anyio
async def test_a_request_whose_client_hung_up_is_never_searched(tmp_path: Path) -> None:
    searcher = SlowSearcher()
    app = create_app(settings_for(tmp_path), open_searcher=lambda _: searcher)
    with serving(app) as url:
        await until_ready(url)
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client:
            first = asyncio.create_task(client.post("/search", json={"queries": ["1"]}))
            await asyncio.to_thread(searcher.entered.wait, 30)
            ahead = asyncio.create_task(client.post("/search", json={"queries": ["ahead"]}))
            await asyncio.to_thread(searcher.ahead.wait, 30)
            gone = asyncio.create_task(client.post("/search", json={"queries": ["2"]}))
            await until(client, "/metrics", "drzero_retrieval_queue_queries 1.0")
            gone.cancel()
            await until(client, "/metrics", "drzero_retrieval_queue_queries 0.0")
            await until(client, "/metrics", 'drzero_retrieval_requests_total{route="/search",status="499"}')
            searcher.go.set()
            assert (await first).status_code == (await ahead).status_code == 200
            assert pmids(await client.post("/search", json={"queries": ["3"]})) == ["3"]
    assert searcher.batches == [["1"], ["ahead"], ["3"]]


@pytest.mark.anyio
async def test_a_small_request_is_not_kept_waiting_by_a_large_one(tmp_path: Path) -> None:
    searcher = SlowSearcher()
    async with in_process(create_app(settings_for(tmp_path), open_searcher=lambda _: searcher)) as client:
        await until(client, "/ready", '"ready"')
        many = [str(number) for number in range(500)]
        async with asyncio.TaskGroup() as group:
            first = group.create_task(client.post("/search", json={"queries": ["first"]}))
            await asyncio.to_thread(searcher.entered.wait, 30)
            ahead = group.create_task(client.post("/search", json={"queries": ["ahead"]}))
            await asyncio.to_thread(searcher.ahead.wait, 30)
            large = group.create_task(client.post("/search", json={"queries": many, "top_k": 1}))
            await until(client, "/metrics", "drzero_retrieval_queue_queries 500.0")
            small = group.create_task(client.post("/search", json={"queries": ["small"]}))
            await until(client, "/metrics", "drzero_retrieval_queue_queries 501.0")
            searcher.go.set()
        assert pmids(large.result()) == many
        assert [pmids(task.result()) for task in (first, ahead, small)] == [["first"], ["ahead"], ["small"]]
    assert "small" in searcher.batches[2]
    assert len(searcher.batches) > 3


@pytest.mark.anyio
async def test_a_defect_is_only_heard_by_the_request_that_makes_it(tmp_path: Path) -> None:
    searcher = SlowSearcher()
    async with in_process(create_app(settings_for(tmp_path), open_searcher=lambda _: searcher)) as client:
        await until(client, "/ready", '"ready"')
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(client.post("/search", json={"queries": ["1"]}))]
            await asyncio.to_thread(searcher.entered.wait, 30)
            group.create_task(client.post("/search", json={"queries": ["ahead"]}))
            await asyncio.to_thread(searcher.ahead.wait, 30)
            tasks += [group.create_task(client.post("/search", json={"queries": [q]})) for q in ("2", "defect", "3")]
            await until(client, "/metrics", "drzero_retrieval_queue_queries 3.0")
            searcher.go.set()
    assert [task.result().status_code for task in tasks] == [200, 200, 500, 200]
