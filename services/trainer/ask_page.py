"""The page of `ask.py --page`: a form, and the answer with its searches and papers as HTML made here.

GET `/?q=…` asks and waits for the answer; it needs no JavaScript. All text of users, models and papers is escaped by
the template, and the content security policy allows neither scripts nor anything from elsewhere. A few questions are
answered at once; further ones get a 503, as does one that a service lets down. A browser that goes away frees its
place.
"""

import asyncio
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import structlog
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from services.trainer.ask import NOTICE, OUTCOMES, Answer, answer_question, checked_question, served_tokens
from services.trainer.conversations import TokenMeasure
from shared.access import Access, api_token
from shared.clients import ServiceError
from shared.command import UsageError
from shared.hang_up import unless_gone
from shared.settings import Settings
from shared.sockets import listen

FOLDER = Path(__file__).parent
AT_ONCE = 4  # questions; a person's page, not a service for programs
RETRY_AFTER_S = 10
STOPS_WITHIN_S = 5  # what is not answered then is given up
CLIENT_GONE = 499  # read by nobody
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def serve_page(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Serve the page on `trainer.port` until the process is stopped."""
    trainer = settings.trainer
    listener = listen("trainer", trainer.host, trainer.port)
    app = create_app(settings, served_tokens(settings))
    log.info("questions are answered", address=f"http://{trainer.host}:{trainer.port}/")
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=STOPS_WITHIN_S)
    server = uvicorn.Server(config)
    asyncio.run(server.serve(sockets=[listener]))


def create_app(settings: Settings, tokens: TokenMeasure) -> FastAPI:
    """GET / and its style sheet."""
    app = FastAPI(title="Dr. Zero answers", openapi_url=None)
    app.add_middleware(Access, token=api_token())
    places = asyncio.Semaphore(AT_ONCE)

    @app.get("/")
    async def page(request: Request) -> Response:
        text = request.query_params.get("q", "")
        if not text:
            return shown("", settings)
        try:
            question = checked_question(text, settings)
        except UsageError as error:
            return shown(text[: settings.retrieval.max_query_chars], settings, problem=str(error), status=422)
        if places.locked():
            return shown(question, settings, problem=f"{AT_ONCE} questions are being answered; try again", status=503)
        try:
            async with places:
                answer = await unless_gone(request.receive, answer_question(question, settings, tokens))
        except ServiceError as error:
            return shown(question, settings, problem=str(error), status=503)
        return Response(status_code=CLIENT_GONE) if answer is None else shown(question, settings, answer=answer)

    @app.get("/ask.css")
    async def style() -> Response:
        return Response((FOLDER / "ask.css").read_bytes(), media_type="text/css", headers=dict(HEADERS))

    return app


def shown(
    question: str, settings: Settings, *, answer: Answer | None = None, problem: str = "", status: int = 200
) -> Response:
    """The page with the question in its form, and an answer or a problem below."""
    html = template().render(
        question=question,
        answer=answer,
        problem=problem,
        outcomes=OUTCOMES,
        notice=NOTICE,
        longest=settings.retrieval.max_query_chars,
    )
    headers = dict(HEADERS) | ({"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {})
    return HTMLResponse(html, status, headers=headers)


@cache
def template() -> Template:
    """The page's template."""
    found = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return found.get_template("ask.html")
