"""Searches of PubMed: how many papers a window of a query holds, and which.

In: who calls, the query and a window. Out: `Found`. Inside `eutils.configured()` only; errors are those of
`eutils.call`. A count alone is not believed blindly (`windows.agreed`); a list must be as long as its count says.
"""

from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

from Bio import Entrez

from services.ingest.eutils import Caller, ErrorReply, call, reply_root
from services.ingest.windows import CAP, Window


@dataclass(frozen=True)
class Found:
    """What a search found: all papers counted, and the PMIDs it was asked to list, in PubMed's own order."""

    count: int
    pmids: tuple[int, ...]
    remark: str  # what PubMed did not understand in the query, or ""


def search(caller: Caller, query: str, window: Window, *, most: int = 0) -> Found:
    """One ESearch that lists the first `most` papers of a window, CAP at most."""
    parameters = search_parameters(query, window) | {"retmax": most}
    return call(caller, Entrez.esearch, parameters, partial(read_search, most=most))


def count(caller: Caller, query: str, window: Window) -> int:
    """How many papers of the query a window holds, by one reply."""
    return search(caller, query, window).count


def listed(caller: Caller, query: str, window: Window) -> Found:
    """The papers of a window; of more than CAP the first CAP."""
    return search(caller, query, window, most=CAP)


def search_parameters(query: str, window: Window) -> dict[str, Any]:
    """ESearch's parameters for a window of a query; both ends of its days are included."""
    created = window.created
    if created:
        query = f'({query}) AND ("{day_text(created.first)}"[crdt] : "{day_text(created.last)}"[crdt])'
    parameters: dict[str, Any] = {"db": "pubmed", "term": query}
    if window.published:
        first, last = window.published.first, window.published.last
        parameters |= {"datetype": "pdat", "mindate": day_text(first), "maxdate": day_text(last)}
    return parameters


def changed_since(query: str, day: date) -> str:
    """The query for those of its papers that PubMed has changed on that day or later."""
    return f'({query}) AND ("{day_text(day)}"[mdat] : "3000"[mdat])'


def read_search(body: bytes, most: int = 0) -> Found:
    """ESearch's reply; ErrorReply when it is something else, or lists another number of papers than it must."""
    root = reply_root(body, "eSearchResult")
    number = root.findtext("Count") or ""
    if not number.isdecimal():
        raise ErrorReply(f"ESearch's Count is {number!r}, expected a number")
    pmids = tuple(int(element.text) for element in root.iterfind("IdList/Id") if (element.text or "").isdecimal())
    if most and len(set(pmids)) != min(int(number), most):
        raise ErrorReply(f"ESearch counts {number} papers, but lists {len(set(pmids))} of the {most} asked for")
    unknown = [e.text for name in ("PhraseNotFound", "FieldNotFound") for e in root.iter(name) if e.text]
    return Found(int(number), pmids, f" (not understood: {', '.join(unknown)})" if unknown else "")


def day_text(day: date) -> str:
    """A day as PubMed writes it."""
    return day.strftime("%Y/%m/%d")
