"""The endpoints. Request models are made here from the settings' limits, so OpenAPI shows the real ones."""

from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from services.retrieval.service import NotReady, SearchService
from services.retrieval.wire import (
    Document,
    Problem,
    RetrieveReply,
    SearchReply,
    Status,
    retrieve_reply,
    search_reply,
)
from shared.metrics import metrics_text
from shared.settings import RetrievalSettings

BUSY: dict[int | str, dict[str, Any]] = {503: {"model": Problem, "description": "Not ready, or too many queries wait."}}
UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "No such paper in this corpus."}}

A_CHARACTER = r"\S"  # a query of blanks means nothing


class Request(BaseModel):
    """A request body; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


def search_routes(service: SearchService, limits: RetrievalSettings) -> APIRouter:
    """POST /search, POST /retrieve and GET /documents/{pmid}."""
    router = APIRouter(tags=["search"])

    class Queries(Request):
        queries: list[Annotated[str, Field(min_length=1, max_length=limits.max_query_chars, pattern=A_CHARACTER)]] = (
            Field(max_length=limits.max_queries, examples=[["Does metformin lower mortality in sepsis?"]])
        )

    class SearchRequest(Queries):
        """Questions or keywords, each answered by itself."""

        top_k: int = Field(limits.top_k, ge=1, le=limits.top_k_max, description="Most hits per query.")

    class RetrieveRequest(Queries):
        """Search-R1's request."""

        topk: Annotated[int, Field(ge=1, le=limits.top_k_max)] | None = Field(
            None, description=f"Most documents per query; null means {limits.top_k}."
        )
        return_scores: bool = Field(False, description="Give document and score instead of the document alone.")

    @router.post("/search", response_model=SearchReply, responses=BUSY)
    async def search(body: SearchRequest) -> JSONResponse:
        """The best papers for each query, best first."""
        found = await service.search(body.queries, body.top_k)
        return JSONResponse(search_reply(body.queries, found))

    @router.post("/retrieve", response_model=RetrieveReply, responses=BUSY)
    async def retrieve(body: RetrieveRequest) -> JSONResponse:
        """The same search in the wire form of Search-R1."""
        found = await service.search(body.queries, limits.top_k if body.topk is None else body.topk)
        return JSONResponse(retrieve_reply(found, return_scores=body.return_scores))

    @router.get("/documents/{pmid}", response_model=Document, responses=BUSY | UNKNOWN)
    async def document(pmid: str) -> JSONResponse:
        """One paper by its PMID."""
        paper = await service.find(pmid)
        if paper is None:
            raise HTTPException(404, f"no paper with PMID {pmid} in this corpus")
        return JSONResponse(paper.as_record())

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
