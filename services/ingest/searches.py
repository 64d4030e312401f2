"""Searches of PubMed: how many papers a window of a query holds, and searches that NCBI keeps for EFetch.

In: who calls, the query and a window. Out: `Found`. Inside `eutils.configured()` only; errors are those of
`eutils.call`. A count is not believed blindly: `agreed_search` asks until two replies agree.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

from Bio import Entrez

from services.ingest.eutils import SERVICE, Caller, ErrorReply, call, reply_root
from services.ingest.windows import Window, agreed
from shared.clients import BadReply


@dataclass(frozen=True)
class Found:
    """A search; NCBI keeps it for us when it has a `web_env`."""

    count: int
    web_env: str
    query_key: str
    remark: str  # what PubMed did not understand in the query, or ""


class History:
    """The kept search of one window, made again when NCBI has lost it. Thread-safe."""

    def __init__(self, search: Callable[[], Found]) -> None:
        self.found = search()
        self._search = search
        self._lock = threading.Lock()

    def renewed(self, lost: Found) -> Found:
        """Another search in place of `lost`; BadReply when it finds another number of papers."""
        with self._lock:
            if self.found is lost:
                found = self._search()
                if found.count != lost.count:
                    raise BadReply(
                        SERVICE, f"found {lost.count} papers, and {found.count} when asked again; run again to go on"
                    )
                self.found = found
            return self.found


def search(caller: Caller, query: str, window: Window, *, keep: bool = False) -> Found:
    """One ESearch; with `keep` NCBI keeps its result."""
    parameters = search_parameters(query, window) | ({"usehistory": "y"} if keep else {})
    return call(caller, Entrez.esearch, parameters, partial(read_search, kept=keep))


def count(caller: Caller, query: str, window: Window) -> int:
    """How many papers of the query a window holds, by one reply."""
    return search(caller, query, window).count


def agreed_search(caller: Caller, query: str, window: Window, planned: int) -> Found:
    """A kept search with the planned count, or with another that two replies agree on."""
    replies: list[Found] = []

    def ask() -> int:
        replies.append(search(caller, query, window, keep=True))
        return replies[-1].count

    agreed(ask, planned)
    return replies[-1]


def search_parameters(query: str, window: Window) -> dict[str, Any]:
    """ESearch's parameters for a window of a query; both ends of its days are included."""
    created = window.created
    if created:
        query = f'({query}) AND ("{_day(created.first)}"[crdt] : "{_day(created.last)}"[crdt])'
    parameters: dict[str, Any] = {"db": "pubmed", "term": query, "retmax": 0}
    if window.published:
        first, last = window.published.first, window.published.last
        parameters |= {"datetype": "pdat", "mindate": _day(first), "maxdate": _day(last)}
    return parameters


def read_search(body: bytes, kept: bool = True) -> Found:
    """ESearch's reply; ErrorReply when it is something else, or was to be kept and is not."""
    root = reply_root(body, "eSearchResult")
    number = root.findtext("Count") or ""
    if not number.isdecimal():
        raise ErrorReply(f"ESearch's Count is {number!r}, expected a number")
    env, key = root.findtext("WebEnv") or "", root.findtext("QueryKey") or ""
    if kept and int(number) and not (env and key):
        raise ErrorReply("ESearch found papers, but its reply lacks WebEnv and QueryKey")
    unknown = [e.text for name in ("PhraseNotFound", "FieldNotFound") for e in root.iter(name) if e.text]
    return Found(int(number), env, key, f" (not understood: {', '.join(unknown)})" if unknown else "")


def _day(day: date) -> str:
    return day.strftime("%Y/%m/%d")
