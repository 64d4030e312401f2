"""The FastAPI app of the search service: endpoints, the page for people, errors of one shape, start and stop.

`create_app(settings)` has no side effects; loading begins when the app is started, and until it has ended well every
endpoint that needs the index answers 503. Every error body is `{"detail": …, "request_id": …}`; for a 422 the detail
is a list whose items name the field in `loc`.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from services.retrieval.batching import Busy
from services.retrieval.border import GONE, Border, TooLarge
from services.retrieval.engine import OpenSearcher
from services.retrieval.page import page_routes
from services.retrieval.routes import ClientGone, paper_routes, probe_routes, search_routes
from services.retrieval.search import Searcher
from services.retrieval.service import NotReady, SearchService
from shared.access import Access, api_token
from shared.settings import RetrievalSettings, Settings

RETRY_AFTER_S = 1
BYTES_OF_A_CHARACTER = 12  # in JSON at worst: two escapes of six
ROOM = 65_536  # for all but the queries


def create_app(
    settings: Settings,
    *,
    open_searcher: OpenSearcher = Searcher,
    on_failure: Callable[[BaseException], None] = lambda _: None,
) -> FastAPI:
    """The app. `on_failure` hears why the searcher could not be opened; whoever owns the process should then end it."""
    service = SearchService(settings, open_searcher=open_searcher, on_failure=on_failure)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(title="Dr. Zero Biomedical: search", lifespan=lifespan)
    app.include_router(search_routes(service, settings.retrieval))
    app.include_router(paper_routes(service, settings.retrieval))
    app.include_router(probe_routes(service))
    app.include_router(page_routes(service, settings.retrieval))
    app.add_exception_handler(RequestValidationError, _unprocessable)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(TooLarge, _too_large)
    app.add_exception_handler(NotReady, _come_back)
    app.add_exception_handler(Busy, _come_back)
    app.add_exception_handler(ClientGone, _gone)
    app.add_middleware(Access, token=api_token())
    app.add_middleware(Border, most_bytes=most_bytes(settings.retrieval))
    return app


def most_bytes(limits: RetrievalSettings) -> int:
    """The largest body that can be within the limits, generously."""
    return limits.max_queries * (BYTES_OF_A_CHARACTER * limits.max_query_chars + 4) + ROOM


def _problem(
    request: Request, status: int, detail: str | list[dict[str, Any]], headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse({"detail": detail, "request_id": request.state.request_id}, status, headers)


async def _unprocessable(request: Request, error: Exception) -> JSONResponse:
    # FastAPI's own reply repeats the input, which may be long, or no JSON at all (NaN, half a surrogate pair).
    items = error.errors() if isinstance(error, RequestValidationError) else []
    return _problem(request, 422, [{key: item[key] for key in ("loc", "msg", "type")} for item in items])


async def _refused(request: Request, error: Exception) -> JSONResponse:
    refused = cast(HTTPException, error)
    return _problem(request, refused.status_code, refused.detail, refused.headers)


async def _too_large(request: Request, error: Exception) -> JSONResponse:
    return _problem(request, 413, str(error), {"Connection": "close"})


async def _come_back(request: Request, error: Exception) -> JSONResponse:
    return _problem(request, 503, str(error), {"Retry-After": str(RETRY_AFTER_S)})


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=GONE)
