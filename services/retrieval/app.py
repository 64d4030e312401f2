"""The FastAPI app of the search service: endpoints, errors of one shape, request metrics, start and stop.

`create_app(settings)` has no side effects; loading begins when the app is started, and until it has ended well every
endpoint that needs the index answers 503. Every error body is `{"detail": …}`; for a 422 the detail is a list whose
items name the field in `loc`.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.retrieval.batching import QueueFull
from services.retrieval.routes import probe_routes, search_routes
from services.retrieval.search import Searcher
from services.retrieval.service import NotReady, OpenSearcher, SearchService
from shared.metrics import REGISTRY, SECONDS
from shared.settings import Settings

RETRY_AFTER_S = 1

REQUESTS = Counter("drzero_retrieval_requests", "Requests answered.", ["route", "status"], registry=REGISTRY)
REQUEST_SECONDS = Histogram(
    "drzero_retrieval_request_seconds", "Time of a request.", ["route"], buckets=SECONDS, registry=REGISTRY
)


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
            service.stop()

    app = FastAPI(title="Dr. Zero Biomedical: search", lifespan=lifespan)
    app.include_router(search_routes(service, settings.retrieval))
    app.include_router(probe_routes(service))
    app.add_exception_handler(RequestValidationError, _unprocessable)
    app.add_exception_handler(NotReady, _come_back)
    app.add_exception_handler(QueueFull, _come_back)
    app.add_exception_handler(Exception, _defect)
    app.add_middleware(RequestMetrics)
    return app


class RequestMetrics:
    """ASGI middleware that counts and times requests by route template, so that PMIDs make no new series."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            REQUESTS.labels(route, str(status)).inc()
            REQUEST_SECONDS.labels(route).observe(time.perf_counter() - started)


async def _unprocessable(_: Request, error: Exception) -> JSONResponse:
    # FastAPI's own reply repeats the input, which may be long, or no JSON at all (NaN, half a surrogate pair).
    items = error.errors() if isinstance(error, RequestValidationError) else []
    detail = [{key: item[key] for key in ("loc", "msg", "type")} for item in items]
    return JSONResponse({"detail": detail}, status_code=422)


async def _come_back(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=503, headers={"Retry-After": str(RETRY_AFTER_S)})


async def _defect(_: Request, __: Exception) -> JSONResponse:
    # The exception itself goes to the log: Starlette raises it again after this reply.
    return JSONResponse({"detail": "the search failed; the service's log says why"}, status_code=500)
