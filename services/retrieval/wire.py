"""The forms on the wire: replies of every endpoint, and the errors' one shape `{"detail": …, "request_id": …}`.

Requests have limits that come from settings, so their models are made in `services.retrieval.routes`. These reply
models document the API (OpenAPI); replies themselves are joined from bytes by the functions below.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, Field
from pydantic_core import to_json

from services.retrieval.documents import Documents
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
    """A corpus record and what it is ordered by."""

    score: float
    document: Document


class SearchHit(ScoredDocument):
    """A corpus record with its score, the parts of that as far as they are known, and its best sentence."""

    dense: float | None = Field(None, description="Cosine of the vectors of paper and query.")
    bm25: float | None = Field(None, description="Score by words.")
    highlight: str | None = Field(None, description="The sentence that fits the query best, when asked for.")


class SearchResult(BaseModel):
    """The hits of one query, best first."""

    query: str
    hits: list[SearchHit]


class SearchReply(BaseModel):
    """One result per query, in the order of the queries."""

    results: list[SearchResult]


class SimilarReply(BaseModel):
    """The papers nearest to one, the nearest first."""

    pmid: str
    hits: list[SearchHit]


class RetrieveReply(BaseModel):
    """Search-R1's form: result[query][rank] is a document, or document and score with `return_scores`."""

    result: list[list[Document | ScoredDocument]]


class Status(BaseModel):
    """What a probe reads."""

    status: str


class Info(BaseModel):
    """What serves: version and manifest of the index, counts of the corpus, device, and the limits on requests."""

    version: str = Field(description="Identity of index and corpus; it changes with their content.")
    searcher: dict[str, Any] = Field(description="Encoder, index and corpus in use.")
    limits: dict[str, float] = Field(description="The settings that bound requests.")
    defaults: dict[str, Any] = Field(description="How a request is searched that says nothing else.")


class WrongField(BaseModel):
    """One thing that is wrong with a request; `loc` is the way to it."""

    loc: list[str | int]
    msg: str
    type: str


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str | list[WrongField]
    request_id: str = Field(description="The X-Request-ID of the request, for whoever looks into the log.")


def search_body(queries: Sequence[str], found: Sequence[Sequence[Hit]], documents: Documents) -> bytes:
    """The body of POST /search."""
    results = [
        b'{"query":%b,"hits":%b}' % (to_json(query), _hits(hits, documents))
        for query, hits in zip(queries, found, strict=True)
    ]
    return b'{"results":%b}' % _array(results)


def similar_body(pmid: str, hits: Sequence[Hit], documents: Documents) -> bytes:
    """The body of GET /similar."""
    return b'{"pmid":%b,"hits":%b}' % (to_json(pmid), _hits(hits, documents))


def retrieve_body(found: Sequence[Sequence[Hit]], documents: Documents, *, return_scores: bool) -> bytes:
    """The body of POST /retrieve, the Search-R1 form in both of its modes."""
    lists = []
    for hits in found:
        bodies = [documents.body(hit.paper) for hit in hits]
        if return_scores:
            scores = [_number(hit.score) for hit in hits]
            bodies = [b'{"document":%b,"score":%b}' % pair for pair in zip(bodies, scores, strict=True)]
        lists.append(_array(bodies))
    return b'{"result":%b}' % _array(lists)


def _hits(hits: Sequence[Hit], documents: Documents) -> bytes:
    return _array(
        b'{"score":%b,"dense":%b,"bm25":%b,"highlight":%b,"document":%b}'
        % (
            _number(hit.score),
            _number(hit.dense),
            _number(hit.bm25),
            to_json(hit.highlight) if hit.highlight else b"null",
            documents.body(hit.paper),
        )
        for hit in hits
    )


def _array(items: Iterable[bytes]) -> bytes:
    return b"[%b]" % b",".join(items)


def _number(value: float | None) -> bytes:
    return b"null" if value is None else repr(float(value)).encode()
