"""The run page: `python -m services.trainer.page`, and in the driver's own process while it runs, on `trainer.port`.

GET `/` shows the run: what it does now, curves, where the time goes, the reward's parts, rollouts with filters,
evaluations and reports. It is whole without JavaScript; with it, htmx brings what is new every second. POST `/control`
pauses, stops and resumes (`control.py`), only where an API token (`shared/access.py`) keeps others out. All of it comes
from files (`page_view.py`, `page_index.py`). Text of models and papers is escaped by the templates, and the content
security policy allows no script but htmx's file.
"""

import argparse
import asyncio
import hashlib
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import structlog
import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from services.trainer.control import ORDERS
from services.trainer.page_control import DONE, carry_out
from services.trainer.page_feed import CHOICES, WrongForm, card, feed_of, fields_of, filters_of, wanted_of, whole_number
from services.trainer.page_index import Key, RunIndex, Wanted
from services.trainer.page_view import evaluations, raised_alarms, reports, standing, training_view
from services.trainer.paths import run_paths
from shared.access import Access, api_token
from shared.command import run
from shared.settings import Settings
from shared.sockets import listen

T = TypeVar("T")
FOLDER = Path(__file__).parent / "run_page"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
REPORT_HEADERS = HEADERS | {  # a page of its own, with its style in it and no script
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; sandbox"
}
FILES = {"run.css": "text/css", "htmx.min.js": "text/javascript"}
SYNC_S, RETRY_S = 0.5, 10.0
READS, READS_S = 300, 5.0  # requests of all readers together: about forty open pages


class Rate:
    """At most `most` events within `seconds`; may be asked by any thread."""

    def __init__(self, most: int, seconds: float) -> None:
        self._seconds = seconds
        self._times: deque[float] = deque([-math.inf] * most, maxlen=most)
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Whether there is room for another event now, which is then counted."""
        now = time.monotonic()
        with self._lock:
            room = self._times[0] < now - self._seconds
            if room:
                self._times.append(now)
            return room


@dataclass
class RunPage:
    """What the routes share: where the run is, its index, and who has asked how often."""

    settings: Settings
    controls: bool  # only where a token keeps others out
    run: Path
    corpus: Path
    index: RunIndex
    reads: Rate = field(default_factory=lambda: Rate(READS, READS_S))
    made: dict[Hashable, tuple[int, Any]] = field(default_factory=dict)  # parts of the page, by version of the index
    behind: bool = True  # whether files of before are still being read


def run_page(settings: Settings, *, controls: bool) -> RunPage:
    """The page of the settings' run."""
    paths = run_paths(settings)
    return RunPage(settings, controls, paths.run, paths.corpus, RunIndex(paths.run, paths.work.parents[1]))


@asynccontextmanager
async def following(page: RunPage) -> AsyncIterator[None]:
    """Within the block the index follows the run's files."""
    ended = threading.Event()

    def follow() -> None:
        log = structlog.get_logger()
        while not ended.is_set():
            try:
                more = page.index.sync()
            except Exception as error:  # noqa: BLE001  # a file that vanishes or is odd must not end the page for good
                log.warning("the run page cannot read a file of the run; it tries again", error=repr(error))
                more = bool(ended.wait(RETRY_S))
            page.behind = page.behind and more
            ended.wait(0 if more else SYNC_S)

    thread = threading.Thread(target=follow, name="run page", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        await asyncio.to_thread(thread.join)


def create_app(settings: Settings, token: str | None) -> FastAPI:
    """The page as an app of its own, which lets in who has the token, or everybody where there is none."""
    page = run_page(settings, controls=token is not None)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with following(page):
            yield

    app = FastAPI(title="Dr. Zero run", openapi_url=None, lifespan=lifespan)
    app.add_middleware(Access, token=token)
    app.include_router(page_routes(page))
    return app


def page_routes(page: RunPage) -> APIRouter:
    """All routes of the page."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    def whole_page(request: Request) -> Response:
        return limited(page) or shown(page, request.query_params)

    @router.get("/live")
    def live(request: Request) -> Response:
        return limited(page) or newer_part(page, request.query_params)

    @router.get("/fresh")
    def fresh(request: Request) -> Response:
        return limited(page) or newer_rollouts(page, request.query_params)

    @router.get("/rollout/{number}")
    def rollout(number: int, request: Request) -> Response:
        return limited(page) or one_rollout(page, number, fragment="hx-request" in request.headers)

    @router.post("/control")
    async def control(request: Request) -> Response:
        outcome = await carry_out(page.run, request, allowed=page.controls)
        return control_reply(page, outcome, browser="text/html" in request.headers.get("accept", ""))

    @router.get("/report")
    def newest_report() -> Response:
        return newest_page(page, "report.html")

    @router.get("/safety.html")  # as the report links to it
    def newest_safety() -> Response:
        return newest_page(page, "safety.html")

    @router.get("/report/{number}/{name}")
    def report(number: int, name: str) -> Response:
        return report_of(page, number, name)

    @router.get("/page/{name}")
    def file(name: str) -> Response:
        if name not in FILES:
            raise HTTPException(404)
        headers = HEADERS | {"Cache-Control": "max-age=3600"}
        return Response((FOLDER / name).read_bytes(), media_type=FILES[name], headers=headers)

    return router


def limited(page: RunPage) -> Response | None:
    """The refusal of a reader when all of them ask too much; None when there is room."""
    if page.reads.take():
        return None
    return Response("too many requests", 429, headers=HEADERS | {"Retry-After": f"{READS_S:.0f}"})


def shown(page: RunPage, query: Mapping[str, str], *, problem: str = "", status: int = 200) -> Response:
    """The whole page."""
    try:
        fields = fields_of(query)
        feed = feed_of(page.index, fields, page.corpus)
    except WrongForm as error:
        fields, feed, problem, status = fields_of({}), feed_of(page.index, fields_of({}), page.corpus), str(error), 422
    html = template("index.html").render(
        live_part(page, query)
        | {
            "feed": feed,
            "choices": CHOICES,
            "problem": problem,
            "controls": page.controls,
            "orders": ORDERS,
            "evaluations": evaluations(page.run),
            "reports": reports(page.run),
        }
    )
    return HTMLResponse(html, status, headers=HEADERS)


def newer_part(page: RunPage, query: Mapping[str, str]) -> Response:
    """The live part of the page, or 204 when it is the one that the reader has."""
    values = live_part(page, query)
    if query.get("seen") == values["version"]:
        return Response(status_code=204, headers=HEADERS)
    return HTMLResponse(template("live.html").render(values), headers=HEADERS)


def live_part(page: RunPage, query: Mapping[str, str]) -> dict[str, Any]:
    """What the live part shows: the run's standing and one training, the newest unless `view` names another."""
    trainings = page.index.trainings()
    named = {f"{number}.{role}": (number, role) for number, role in trainings}
    key: Key | None = named.get(query.get("view", ""), trainings[-1] if trainings else None)
    now, version = standing(page.settings, page.run, page.index), page.index.version
    values: dict[str, Any] = {
        "run": page.run.name,
        "profile": page.settings.profile,
        "now": now,
        "trainings": trainings,
        "chosen": query.get("view", "") if query.get("view", "") in named else "",
        "behind": page.index.count(Wanted()) if page.behind else 0,
    }
    stamp = hashlib.sha256(repr((values, key, version)).encode()).hexdigest()[:16]
    view = kept(page, ("view", key), version, lambda: training_view(page.index, key)) if key else None
    raised = kept(
        page, ("alarms", now.training), version, lambda: raised_alarms(page.settings, now.training, page.index)
    )
    return values | {"version": stamp, "view": view, "alarms": raised}


def kept(page: RunPage, name: Hashable, version: int, make: Callable[[], T]) -> T:
    """What `make` gives; it is asked once for a version of the index."""
    if name not in page.made or page.made[name][0] != version:
        page.made[name] = version, make()
    found: T = page.made[name][1]
    return found


def newer_rollouts(page: RunPage, query: Mapping[str, str]) -> Response:
    """How many rollouts that fit have come since the reader's page was made."""
    try:
        fields = fields_of(query)
        after = whole_number(fields, "after") or 0
        count = page.index.count(wanted_of(fields), after=after)
    except WrongForm as error:
        return Response(str(error), 422, media_type="text/plain", headers=HEADERS)
    html = template("fresh.html").render(count=count, after=after, filters=filters_of(fields))
    return HTMLResponse(html, headers=HEADERS)


def one_rollout(page: RunPage, number: int, *, fragment: bool) -> Response:
    """A rollout with all its turns: a part for the page, or a page of its own."""
    found = page.index.rollout(number) if number < 2**62 else None
    if found is None:
        text = "This rollout is no longer there: its step is being made again. Load the page anew."
        return HTMLResponse(f"<p>{text}</p>", 404, headers=HEADERS)
    name = "turns.html" if fragment else "rollout.html"
    html = template(name).render(card=card(found, page.corpus, titles=True), run=page.run.name)
    return HTMLResponse(html, headers=HEADERS)


def newest_page(page: RunPage, name: str) -> Response:
    """A page of the report of the last round that has one."""
    found = reports(page.run)
    if not found:
        return JSONResponse({"detail": "no report yet: it is written when a round ends"}, status_code=404)
    return report_of(page, found[-1], name)


def report_of(page: RunPage, number: int, name: str) -> Response:
    """A page of the report of a round."""
    pages = {file.name: file for file in (page.run / str(number) / "report").glob("*.html")}
    if name not in pages:
        return JSONResponse({"detail": f"round {number} has no {name[:40]}"}, status_code=404)
    return FileResponse(pages[name], media_type="text/html", headers=REPORT_HEADERS)


def control_reply(page: RunPage, outcome: tuple[int, str], *, browser: bool) -> Response:
    """What `carry_out` has brought: for a browser the page, for a program JSON."""
    status, text = outcome
    if not browser:
        return JSONResponse({"order" if status == DONE else "detail": text}, status, headers=HEADERS)
    if status == DONE:
        return RedirectResponse("/", 303)
    return shown(page, {}, problem=f"{text[:1].upper()}{text[1:]}.", status=status)


@cache
def environment() -> Environment:
    """The templates."""
    return Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def template(name: str) -> Any:
    """One template by its name."""
    return environment().get_template(name)


def main(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Serve the page on `trainer.port` until the process is stopped."""
    trainer = settings.trainer
    app = create_app(settings, api_token())
    listener = listen("trainer", trainer.host, trainer.port)
    log.info("run page", address=f"http://{trainer.host}:{trainer.port}/")
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, limit_concurrency=100))
    asyncio.run(server.serve(sockets=[listener]))


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m services.trainer.page", description="Serve the run page.").parse_args()
    raise SystemExit(run("page", main))
