"""The endpoints. Request models are made here from the settings' limits, so OpenAPI shows the real ones."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, get_type_hints

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.types import Receive

from services.retrieval import query as asked
from services.retrieval.service import NotReady, SearchService
from services.retrieval.wire import (
    Document,
    Info,
    Problem,
    RetrieveReply,
    SearchReply,
    SimilarReply,
    Status,
    retrieve_body,
    search_body,
    similar_body,
)
from shared.metrics import metrics_text
from shared.settings import RetrievalSettings

Responses = dict[int | str, dict[str, Any]]

WRONG: Responses = {422: {"model": Problem, "description": "The request is wrong; `loc` names the field."}}
BUSY: Responses = {
    503: {"model": Problem, "description": "Not ready, too many queries wait, or no answer within the deadline."}
}
LARGE: Responses = {413: {"model": Problem, "description": "The body is too large."}}
UNKNOWN: Responses = {404: {"model": Problem, "description": "No such paper in this corpus."}}

# A query of blanks means nothing. Python, Rust and ECMAScript differ in what \s is; with the rest they agree.
A_CHARACTER = r"[^\s\x1c-\x1f\x85\ufeff]"
LONGEST_NAME = 300
MOST_NAMES = 100
LIMITS = ("top_k_max", "max_queries", "max_query_chars", "queue_queries", "deadline_s")
DEFAULTS = ("mode", "fusion", "dense_share", "candidates", "top_k", "rerank_model", "rerank_candidates", "cache")


def whole(value: object) -> object:
    """3 for 3.0, which is an integer by JSON schema; anything else unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(whole)
Year = Annotated[int, Field(ge=0, le=9999), WHOLE]
Names = Annotated[list[Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]], Field(max_length=MOST_NAMES)]


class Strict(BaseModel):
    """A part of a request; unknown fields are errors, and so is a number written as text."""

    model_config = ConfigDict(extra="forbid", strict=True)


class WantedPapers(Strict):
    """Which papers may be found: all that fulfil every condition given. Of the names in one field any may match."""

    year_from: Year | None = Field(None, examples=[2015])
    year_to: Year | None = Field(None, examples=[2024])
    journals: Names = Field([], description="Full or abbreviated; case does not matter.", examples=[["Lancet"]])
    mesh_terms: Names = Field([], description="MeSH descriptors.", examples=[["Sepsis"]])
    publication_types: Names = Field([], examples=[["Review", "Randomized Controlled Trial"]])

    def filters(self) -> asked.Filters:
        """As the searcher takes them."""
        return asked.Filters(
            year_from=self.year_from,
            year_to=self.year_to,
            journals=tuple(self.journals),
            mesh_terms=tuple(self.mesh_terms),
            publication_types=tuple(self.publication_types),
        )


class ClientGone(Exception):
    """Nobody waits for the answer any longer."""


class DirectRoute(APIRoute):
    """A route whose body pydantic reads from the bytes, once; FastAPI would parse, copy and check it by itself.

    The endpoint takes `body` and gives the whole reply. Its work is cancelled when the client hangs up.
    """

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]  # wants a Coroutine
        """What FastAPI calls for each request."""
        model: type[BaseModel] = get_type_hints(self.endpoint)["body"]

        async def handle(request: Request) -> Response:
            try:
                body = model.model_validate_json(await request.body())
            except ValidationError as error:
                items = error.errors(include_url=False, include_context=False, include_input=False)
                raise RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in items]) from error
            async with while_connected(request.receive):
                content: bytes = await self.endpoint(body)
            return Response(content, media_type="application/json")

        return handle


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancels the block when the client hangs up, and raises ClientGone. The request's body must have been read."""
    work = asyncio.current_task()
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = work is not None and work.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and work is not None and not work.uncancel():
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()


def search_routes(service: SearchService, limits: RetrievalSettings) -> APIRouter:
    """POST /search and POST /retrieve."""
    router = APIRouter(tags=["search"], route_class=DirectRoute)

    class Queries(Strict):
        queries: list[Annotated[str, Field(min_length=1, max_length=limits.max_query_chars, pattern=A_CHARACTER)]] = (
            Field(max_length=limits.max_queries, examples=[["Does metformin lower mortality in sepsis?"]])
        )

    class SearchRequest(Queries):
        """Questions or keywords, each answered by itself."""

        top_k: Annotated[int, Field(ge=1, le=limits.top_k_max, description="Most hits per query."), WHOLE] = (
            limits.top_k
        )
        mode: asked.Mode = Field(limits.mode, description="By vectors (dense), by words (bm25), or by both.")
        filters: WantedPapers | None = None  # a default of its own would be copied for every request
        rerank: bool if limits.rerank_model else Literal[False] = Field(  # type: ignore[valid-type]
            False, description="Let a cross-encoder order the best papers; needs `retrieval.rerank_model`."
        )
        highlight: bool = Field(False, description="Give the sentence of each paper that fits the query best.")
        deadline_s: float = Field(
            limits.deadline_s,
            gt=0,
            le=limits.deadline_s,
            description="Without an answer within so many seconds the reply is a 503.",
        )

    class RetrieveRequest(Queries):
        """Search-R1's request."""

        topk: Annotated[int, Field(ge=1, le=limits.top_k_max), WHOLE] | None = Field(
            None, description=f"Most documents per query; null means {limits.top_k}."
        )
        return_scores: bool = Field(False, description="Give document and score instead of the document alone.")

    @router.post("/search", response_model=SearchReply, responses=WRONG | LARGE | BUSY)
    async def search(body: SearchRequest) -> bytes:
        """The best papers for each query, best first."""
        filters = body.filters.filters() if body.filters else asked.NO_FILTERS
        queries = [
            asked.Query(text, body.top_k, body.mode, rerank=body.rerank, highlight=body.highlight, filters=filters)
            for text in body.queries
        ]
        engine = service.engine
        found = await service.search(engine, queries, within_s=body.deadline_s)
        return search_body(body.queries, found, engine.documents)

    @router.post("/retrieve", response_model=RetrieveReply, responses=WRONG | LARGE | BUSY)
    async def retrieve(body: RetrieveRequest) -> bytes:
        """The same search in the wire form of Search-R1, in the mode that the settings name."""
        engine = service.engine
        found = await service.search(engine, [asked.Query.plain(text, limits, body.topk) for text in body.queries])
        return retrieve_body(found, engine.documents, return_scores=body.return_scores)

    return router


def paper_routes(service: SearchService, limits: RetrievalSettings) -> APIRouter:
    """GET /documents/{pmid}, /similar/{pmid} and /info."""
    router = APIRouter(tags=["papers"])

    @router.get("/documents/{pmid}", response_model=Document, responses=WRONG | BUSY | UNKNOWN)
    async def document(pmid: str, request: Request) -> Response:
        """One paper by its PMID."""
        engine = service.engine
        async with while_connected(request.receive):
            paper = await service.find(engine, pmid)
        if paper is None:
            raise HTTPException(404, f"no paper with PMID {pmid} in this corpus")
        return _json(engine.documents.body(paper))

    @router.get("/similar/{pmid}", response_model=SimilarReply, responses=WRONG | BUSY | UNKNOWN)
    async def similar(
        pmid: str,
        request: Request,
        top_k: Annotated[int, Query(ge=1, le=limits.top_k_max, description="Most hits.")] = limits.top_k,
    ) -> Response:
        """The papers whose vectors are nearest to that of one paper; itself is not among them."""
        engine = service.engine
        async with while_connected(request.receive):
            hits = await service.similar(engine, pmid, top_k)
        if hits is None:
            raise HTTPException(404, f"no paper with PMID {pmid} in this corpus")
        return _json(similar_body(pmid, hits, engine.documents))

    @router.get("/info", responses=BUSY)
    async def info() -> Info:
        """What serves: versions, manifest, counts, device, limits."""
        engine = service.engine
        known = await service.info(engine)
        values = limits.model_dump(mode="json")
        return Info(
            version=engine.version,
            searcher=known,
            limits={name: values[name] for name in LIMITS},
            defaults={name: values[name] for name in DEFAULTS},
        )

    return router


def probe_routes(service: SearchService) -> APIRouter:
    """GET /health, /ready and /metrics."""
    router = APIRouter(tags=["operation"])

    @router.get("/health")
    async def health() -> Status:
        """The process lives."""
        return Status(status="alive")

    @router.get("/ready", responses=BUSY)
    async def ready() -> Status:
        """The index is loaded, belongs to this corpus and encoder, and has answered a query."""
        if service.not_ready is not None:
            raise NotReady(f"not ready: {service.not_ready}")
        return Status(status="ready")

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus text."""
        body, content_type = metrics_text()
        return Response(body, media_type=content_type)

    return router


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
