"""The forms on the wire: replies of every endpoint, and the errors' one shape `{"detail": …}`.

Requests have limits that come from settings, so their models are made in `services.retrieval.routes`. These reply
models document the API (OpenAPI); replies themselves are plain dicts made by the two functions below.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from shared.records import Hit


class Document(BaseModel):
    """A corpus record; `id` (the PMID) and `contents` (title, newline, abstract) are for Search-R1 clients."""

    id: str
    pmid: str
    title: str
    abstract: str
    authors: list[str]
    journal: str
    pub_date: str
    mesh_terms: list[str]
    doi: str
    vernacular_title: str
    journal_abbreviation: str
    issn: str
    pub_date_text: str
    pmc: str
    languages: list[str]
    publication_types: list[str]
    keywords: list[str]
    mesh_headings: list[str]
    links: list[str]
    retracted: bool
    text: str
    contents: str


class ScoredDocument(BaseModel):
    """A corpus record and the cosine of its vector and the query's."""

    score: float
    document: Document


class SearchResult(BaseModel):
    """The hits of one query, best first."""

    query: str
    hits: list[ScoredDocument]


class SearchReply(BaseModel):
    """One result per query, in the order of the queries."""

    results: list[SearchResult]


class RetrieveReply(BaseModel):
    """Search-R1's form: result[query][rank] is a document, or document and score with `return_scores`."""

    result: list[list[Document | ScoredDocument]]


class Status(BaseModel):
    """What a probe reads."""

    status: str


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str


def search_reply(queries: Sequence[str], found: Sequence[Sequence[Hit]]) -> dict[str, Any]:
    """The body of POST /search."""
    return {
        "results": [
            {"query": query, "hits": [_scored(hit) for hit in hits]} for query, hits in zip(queries, found, strict=True)
        ]
    }


def retrieve_reply(found: Sequence[Sequence[Hit]], *, return_scores: bool) -> dict[str, Any]:
    """The body of POST /retrieve, the Search-R1 form in both of its modes."""
    return {"result": [[_scored(hit) if return_scores else hit.paper.as_record() for hit in hits] for hits in found]}


def _scored(hit: Hit) -> dict[str, Any]:
    return {"document": hit.paper.as_record(), "score": hit.score}
