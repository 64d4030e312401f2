"""A newly published index is taken up while requests run; a broken one is told and left alone."""

import asyncio
import threading
from pathlib import Path

import httpx
import pytest
import structlog
from corpora import publish_corpus
from retrieval_world import PAPERS, SlowSearcher, WordSearcher, in_process, needs_minilm, serving, settings_for, until

from services.retrieval.app import create_app
from services.retrieval.build import build
from services.retrieval.integrity import verify
from shared.clients import SearchClient
from shared.files import ArtifactError, publish
from shared.metrics import REGISTRY
from shared.settings import Settings


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def publish_index(folder: Path, version: str) -> None:
    with publish(folder / "index", settings={"version": version}, made_from={}) as draft:
        (draft.path / "content").write_text(version)


def reloads(outcome: str) -> float:
    return REGISTRY.get_sample_value("drzero_retrieval_reloads_total", {"outcome": outcome}) or 0.0


@pytest.mark.anyio
async def test_requests_under_way_keep_their_index_and_later_ones_have_the_new_one(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS)
    publish_index(tmp_path, "one")
    old, new = SlowSearcher(), WordSearcher(PAPERS[:5], "two")
    opened = iter([old, new])
    settings = settings_for(tmp_path, RETRIEVAL__WATCH_S="0.01")
    app = create_app(settings, open_searcher=lambda _: next(opened))
    before = reloads("done")
    async with in_process(app) as client, asyncio.TaskGroup() as group:
        await until(client, "/ready", '"ready"')
        running = group.create_task(client.post("/search", json={"queries": ["1"], "top_k": 1}))
        await asyncio.to_thread(old.entered.wait, 30)
        queued = group.create_task(client.post("/search", json={"queries": ["2"], "top_k": 1}))
        await asyncio.to_thread(old.ahead.wait, 30)
        publish_index(tmp_path, "two")
        await until(client, "/metrics", f'version="{new.manifest.identity[:12]}"}} 1.0')
        later = group.create_task(client.post("/search", json={"queries": ["gout"], "top_k": 9}))
        await until(client, "/metrics", "drzero_retrieval_queue_queries 1.0")
        assert f'version="{old.manifest.identity[:12]}"' not in (await client.get("/metrics")).text
        old.go.set()
    for task, text in ((running, "1"), (queued, "2")):
        assert [hit["document"]["pmid"] for hit in task.result().json()["results"][0]["hits"]] == [text]
    assert len(later.result().json()["results"][0]["hits"]) == 5
    assert old.batches == [["1"], ["2"]]
    assert reloads("done") == before + 1


@pytest.mark.anyio
async def test_a_new_index_that_cannot_be_opened_leaves_the_old_one_serving_and_a_good_one_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_corpus(tmp_path, PAPERS)
    publish_index(tmp_path, "one")
    names = iter(["one", "broken", "three"])

    def open_searcher(_: Settings) -> WordSearcher:
        name = next(names)
        if name == "broken":
            raise ArtifactError("index made from another corpus")
        return WordSearcher(PAPERS, name)

    settings = settings_for(tmp_path, RETRIEVAL__WATCH_S="0.01")
    failed, done = reloads("failed"), reloads("done")
    async with in_process(create_app(settings, open_searcher=open_searcher)) as client:
        await until(client, "/ready", '"ready"')
        publish_index(tmp_path, "two")
        await until(client, "/metrics", f'reloads_total{{outcome="failed"}} {failed + 1}')
        assert (await client.get("/ready")).status_code == 200
        assert (await client.get("/info")).json()["version"] == WordSearcher(PAPERS, "one").manifest.identity
        publish_index(tmp_path, "three")
        await until(client, "/metrics", f'reloads_total{{outcome="done"}} {done + 1}')
        assert (await client.get("/info")).json()["version"] == WordSearcher(PAPERS, "three").manifest.identity
    assert "cannot be used; the old one stays" in capsys.readouterr().out


@pytest.mark.anyio
async def test_a_new_index_with_a_damaged_file_is_not_taken_up(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS)
    publish_index(tmp_path, "one")
    settings = settings_for(tmp_path, RETRIEVAL__WATCH_S="0.01")
    failed = reloads("failed")
    async with in_process(create_app(settings, open_searcher=lambda _: WordSearcher())) as client:
        await until(client, "/ready", '"ready"')
        with publish(tmp_path / "elsewhere", settings={"version": "two"}, made_from={}) as draft:
            (draft.path / "content").write_text("two")
        (tmp_path / "elsewhere" / "content").write_text("2wo")
        link = tmp_path / "link"
        link.symlink_to((tmp_path / "elsewhere").resolve())
        link.replace(tmp_path / "index")
        await until(client, "/metrics", f'reloads_total{{outcome="failed"}} {failed + 1}')
        assert (await client.get("/ready")).status_code == 200


@pytest.mark.anyio
async def test_files_too_large_for_the_start_are_hashed_while_it_serves_and_a_damaged_one_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_corpus(tmp_path, PAPERS)
    publish_index(tmp_path, "one")
    (tmp_path / "index" / "content").write_text("other")
    heard: list[BaseException] = []
    hashing = threading.Event()

    def verify_later(paths: list[Path]) -> None:
        assert hashing.wait(30)
        verify(paths)

    monkeypatch.setattr("services.retrieval.integrity.AT_START_GB", 0.0)
    monkeypatch.setattr("services.retrieval.service.verify", verify_later)
    app = create_app(settings_for(tmp_path), open_searcher=lambda _: WordSearcher(), on_failure=heard.append)
    async with in_process(app) as client:
        await until(client, "/ready", '"ready"')
        hashing.set()
        await until(client, "/ready", "does not have the content its manifest names")
    assert "index/content" in str(heard) or "content does not have" in str(heard)


@needs_minilm
def test_no_request_fails_or_mixes_while_a_real_index_is_replaced(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS[:40])
    settings = settings_for(tmp_path, RETRIEVAL__WATCH_S="0.05")
    build(settings, structlog.get_logger())

    def grow() -> None:
        publish_corpus(tmp_path, PAPERS)
        build(settings, structlog.get_logger())

    async def ask(url: str) -> set[int]:
        sizes = set()
        builder = threading.Thread(target=grow)
        async with SearchClient(url, patience_s=60) as client, asyncio.timeout(60):
            await client.call("GET", "/ready")
            builder.start()
            while len(PAPERS) not in sizes:
                ((*hits,),) = await client.search([PAPERS[7].text], 100)
                assert hits[0].paper == PAPERS[7]
                sizes.add(len(hits))
        builder.join()
        return sizes

    with serving(create_app(settings)) as url:
        assert asyncio.run(ask(url)) == {40, len(PAPERS)}
        with httpx.Client(base_url=url, trust_env=False) as client:
            assert client.get(f"/documents/{PAPERS[-1].pmid}").json() == PAPERS[-1].as_record()
