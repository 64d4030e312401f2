"""A local E-utilities-like server on a free port, for tests: ESearch and EFetch with a list of faults to play first.

`faults` holds, per utility, replies that are given once each before the real ones: (status, headers, body), or the
names "cut" (a body shorter than announced) and "hold" (no reply until `released` is set).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

ARTICLE = (
    '<PubmedArticle><MedlineCitation><PMID Version="1">{pmid}</PMID><Article><Journal><JournalIssue><PubDate>'
    "<Year>2020</Year></PubDate></JournalIssue><Title>J</Title></Journal><ArticleTitle>Title {pmid}.</ArticleTitle>"
    "{abstract}</Article></MedlineCitation></PubmedArticle>"
)
ABSTRACT = "<Abstract><AbstractText>Abstract of {pmid}.</AbstractText></Abstract>"


def article(pmid: int, *, abstract: bool = True) -> str:
    """One minimal PubMed record."""
    return ARTICLE.format(pmid=pmid, abstract=ABSTRACT.format(pmid=pmid) if abstract else "")


def article_set(pmids: list[int]) -> bytes:
    """A `PubmedArticleSet` of minimal records."""
    body = "".join(article(pmid) for pmid in pmids)
    return f'<?xml version="1.0"?>\n<PubmedArticleSet>{body}</PubmedArticleSet>'.encode()


class EutilsServer(ThreadingHTTPServer):
    """The server; `requests` are the (utility, parameters) it was asked, in order."""

    daemon_threads = True

    def __init__(self, pmids: list[int]) -> None:
        super().__init__(("127.0.0.1", 0), _Replies)
        self.pmids = pmids
        self.faults: dict[str, list[Any]] = {"esearch": [], "efetch": []}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.held = threading.Event()
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/entrez/eutils"

    def reply(self, utility: str, asked: dict[str, str]) -> bytes:
        if utility == "efetch":
            start = int(asked["retstart"])
            return article_set(self.pmids[start : start + int(asked["retmax"])])
        return (
            f'<?xml version="1.0"?><eSearchResult><Count>{len(self.pmids)}</Count><RetMax>0</RetMax>'
            "<QueryKey>1</QueryKey><WebEnv>MCID_1</WebEnv><IdList/></eSearchResult>"
        ).encode()


class _Replies(BaseHTTPRequestHandler):
    server: EutilsServer

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        utility = parts.path.rsplit("/", 1)[-1].removesuffix(".fcgi")
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.server.requests.append((utility, asked))
        faults = self.server.faults[utility]
        fault = faults.pop(0) if faults else None
        if fault == "hold":
            self.server.held.set()
            self.server.released.wait(60)
            return
        body = self.server.reply(utility, asked)
        status, headers, body = (200, {}, body) if fault in (None, "cut") else fault
        self.send_response(status)
        for name, value in ({"Content-Type": "text/xml"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class names it so
        """Silent."""


@contextmanager
def serving(pmids: list[int]) -> Iterator[EutilsServer]:
    """A running server that answers every query with these PMIDs."""
    with EutilsServer(pmids) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
