"""A local E-utilities server on a free port, for tests: ESearch and EFetch as NCBI answers them, and its faults.

ESearch ignores the words of the term, but not its dates: `mindate`, `maxdate` with `datetype=pdat`, and clauses
`"2020/01/01"[crdt] : "2020/01/31"[crdt]` and `"2020/01/01"[mdat] : "3000"[mdat]`. It lists the newest PMID first, lists
no more than 9,999, refuses a later `retstart`, and keeps a search with `usehistory`. EFetch answers by history or by a
list of ids; GET and POST. `papers` can be exchanged while it runs.

Faults come in two ways. `faults` holds, per utility, replies that are given once each before the real ones: (status,
headers, body), or the names "cut" (a body shorter than announced) and "hold" (no reply until `released` is set).
`rates` holds probabilities by the names in `KINDS`; `seed` makes their order repeatable for one worker.
"""

import random
import re
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

CAP = 9_999
SLOW_S = 0.1
ARTICLE = (
    '<PubmedArticle><MedlineCitation><PMID Version="1">{pmid}</PMID><Article><Journal><JournalIssue><PubDate>'
    "<Year>{year}</Year></PubDate></JournalIssue><Title>J</Title></Journal><ArticleTitle>{title}</ArticleTitle>"
    "{abstract}</Article></MedlineCitation></PubmedArticle>"
)
ABSTRACT = "<Abstract><AbstractText>Abstract of {pmid}.</AbstractText></Abstract>"
KINDS = ("429", "429 retry-after", "5xx", "cut", "short", "error in 200", "html", "slow", "count")
CREATED = re.compile(r'"([\d/]+)"\[crdt\] : "([\d/]+)"\[crdt\]')
MODIFIED = re.compile(r'"([\d/]+)"\[mdat\] : "3000"\[mdat\]')
LOST = b"<eFetchResult><ERROR>Unable to obtain query #1</ERROR></eFetchResult>"
BEYOND = (
    b"<eSearchResult><ERROR>Search Backend failed: Exception:\n'retstart' cannot be larger than 9998. For PubMed, "
    b"ESearch can only retrieve the first 9,999 records matching the query.</ERROR></eSearchResult>"
)


@dataclass(frozen=True, order=True)
class Held:
    """One paper of the server."""

    published: date
    created: date
    pmid: int
    modified: date | None = None  # the day of its creation unless it is named
    title: str = ""


def article(pmid: int, *, abstract: bool = True, year: int = 2020, title: str = "") -> str:
    """One minimal PubMed record."""
    text = ABSTRACT.format(pmid=pmid) if abstract else ""
    return ARTICLE.format(pmid=pmid, year=year, abstract=text, title=title or f"Title {pmid}.")


def article_set(pmids: Sequence[int], titles: Mapping[int, str] | None = None) -> bytes:
    """A `PubmedArticleSet` of minimal records."""
    body = "".join(article(pmid, title=(titles or {}).get(pmid, "")) for pmid in pmids)
    return f'<?xml version="1.0"?>\n<PubmedArticleSet>{body}</PubmedArticleSet>'.encode()


def spread(number: int, *, seed: int = 0, first: date = date(1950, 1, 1), days: int = 26_000) -> list[Held]:
    """Papers 1 … number on days drawn at random, the later the more, and created a month later at most."""
    draw = random.Random(seed)  # noqa: S311
    published = sorted(first + timedelta(days=int(days * draw.random() ** 0.4)) for _ in range(number))
    return [Held(day, day + timedelta(days=draw.randrange(30)), pmid) for pmid, day in enumerate(published, start=1)]


class EutilsServer(ThreadingHTTPServer):
    """The server; `requests` are the (utility, parameters) it was asked, `times` when, both in order."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, papers: Sequence[Held], rates: dict[str, float], seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Replies)
        self.hold(papers)
        self.kept: dict[str, list[int]] = {}
        self.faults: dict[str, list[Any]] = {"esearch": [], "efetch": []}
        self.rates = rates
        self.retry_after = "1"
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.times: list[float] = []
        self.held = threading.Event()
        self.released = threading.Event()
        self.lock = threading.Condition()
        self._draw = random.Random(seed)  # noqa: S311

    def hold(self, papers: Sequence[Held]) -> None:
        """Hold these papers from now on."""
        self.papers = sorted(papers, key=lambda paper: paper.published)
        self.days = [paper.published for paper in self.papers]
        self.titles = {paper.pmid: paper.title for paper in papers}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/entrez/eutils"

    def noted(self, utility: str, asked: dict[str, str]) -> Any:
        """Note a request; the fault it is to meet, or None."""
        with self.lock:
            self.requests.append((utility, asked))
            self.times.append(time.monotonic())
            self.lock.notify_all()
            if self.faults[utility]:
                return self.faults[utility].pop(0)
            draw = self._draw.random()
            for kind, rate in self.rates.items():
                if draw < rate:
                    return kind
                draw -= rate
            return None

    def wait_for(self, requests: int) -> bool:
        """Wait until so many requests have come; False after a minute."""
        with self.lock:
            return self.lock.wait_for(lambda: len(self.requests) >= requests, timeout=60)

    def matches(self, asked: dict[str, str]) -> list[int]:
        """PMIDs that a search finds, newest first."""
        papers: Sequence[Held] = self.papers
        if asked.get("datetype") == "pdat":
            first, last = (
                bisect_left(self.days, _day(asked["mindate"])),
                bisect_right(self.days, _day(asked["maxdate"])),
            )
            papers = self.papers[first:last]
        created = CREATED.search(asked.get("term", ""))
        if created:
            papers = [p for p in papers if _day(created[1]) <= p.created <= _day(created[2])]
        modified = MODIFIED.search(asked.get("term", ""))
        if modified:
            papers = [p for p in papers if (p.modified or p.created) >= _day(modified[1])]
        return sorted((paper.pmid for paper in papers), reverse=True)

    def esearch(self, asked: dict[str, str], fault: Any) -> bytes:
        if int(asked.get("retstart", 0)) >= CAP:
            return BEYOND
        pmids, start = self.matches(asked), int(asked.get("retstart", 0))
        listed = pmids[start : min(start + int(asked.get("retmax", 20)), CAP)]
        count, kept = len(pmids), ""
        if fault == "count":
            with self.lock:
                count = self._draw.randrange(2 * count + 1000)
        if asked.get("usehistory") == "y":
            with self.lock:
                name = f"MCID_{len(self.kept) + 1}"
                self.kept[name] = pmids
            kept = f"<QueryKey>1</QueryKey><WebEnv>{name}</WebEnv>"
        ids = "".join(f"<Id>{pmid}</Id>" for pmid in listed)
        return (
            f'<?xml version="1.0" encoding="UTF-8" ?><eSearchResult><Count>{count}</Count>'
            f"<RetMax>{len(listed)}</RetMax><RetStart>{start}</RetStart>{kept}<IdList>{ids}</IdList></eSearchResult>"
        ).encode()

    def efetch(self, asked: dict[str, str], fault: Any) -> bytes | tuple[int, dict[str, str], bytes]:
        if "id" in asked:
            batch = [pmid for pmid in map(int, asked["id"].split(",")) if pmid in self.titles]
        else:
            pmids, start = self.kept.get(asked["WebEnv"]), int(asked.get("retstart", 0))
            if pmids is None:  # as a 400 or inside a 200: NCBI does both
                return LOST if start % 2 else (400, {}, LOST)
            batch = pmids[start : start + int(asked["retmax"])]
        if fault == "short" and batch:
            with self.lock:
                batch = self._draw.sample(batch, self._draw.randrange(len(batch)))
        return article_set(batch, self.titles)


class _Replies(BaseHTTPRequestHandler):
    server: EutilsServer

    def do_GET(self) -> None:
        self._answer(urlsplit(self.path).query)

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])).decode())

    def _answer(self, query: str) -> None:
        utility = urlsplit(self.path).path.rsplit("/", 1)[-1].removesuffix(".fcgi")
        asked = {name: values[0] for name, values in parse_qs(query).items()}
        fault = self.server.noted(utility, asked)
        if fault == "hold":
            self.server.held.set()
            self.server.released.wait(60)
            return
        if fault == "slow":
            self.server.released.wait(SLOW_S)
        reply = self._fault(fault) or getattr(self.server, utility)(asked, fault)
        status, headers, body = reply if isinstance(reply, tuple) else (200, {}, reply)
        self.send_response(status)
        for name, value in ({"Content-Type": "text/xml"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    def _fault(self, fault: Any) -> tuple[int, dict[str, str], bytes] | None:
        if isinstance(fault, tuple):
            return fault
        limited = b'{"error":"API rate limit exceeded","api-key":"198.51.100.7","count":"4","limit":"3"}'
        return {
            "429": (429, {}, limited),
            "429 retry-after": (429, {"Retry-After": self.server.retry_after}, limited),
            "5xx": (502, {"Content-Type": "text/html"}, b"<html><body>Bad Gateway</body></html>"),
            "error in 200": (200, {}, b"<eFetchResult><ERROR>Search Backend failed: timeout</ERROR></eFetchResult>"),
            "html": (200, {"Content-Type": "text/html"}, b"<!DOCTYPE html><html><body>Maintenance</body></html>"),
        }.get(fault)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class names it so
        """Silent."""


@contextmanager
def serving(
    papers: Sequence[int | Held], *, rates: dict[str, float] | None = None, seed: int = 0
) -> Iterator[EutilsServer]:
    """A running server that holds these papers; plain PMIDs are of 2020-01-01."""
    day = date(2020, 1, 1)
    held = [paper if isinstance(paper, Held) else Held(day, day, paper) for paper in papers]
    with EutilsServer(held, rates or {}, seed) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def most_in_a_second(times: Sequence[float]) -> int:
    """The largest number of these times in any one-second window."""
    ordered = sorted(times)
    return max((bisect_left(ordered, start + 1.0) - i for i, start in enumerate(ordered)), default=0)


def _day(text: str) -> date:
    return date(*map(int, text.split("/")))
