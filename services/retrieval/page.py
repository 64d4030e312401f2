"""The search page for people at `/`: a form and its results as HTML made here; it needs no JavaScript.

`/?q=…` searches, with mode, k, year_from, year_to, journal, mesh and type as the form has them (several names
separated by semicolons); `/?like=<PMID>` lists similar papers. Everything from users and papers is escaped by the
template, and the content security policy allows neither scripts nor anything from elsewhere.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from services.retrieval.batching import Busy
from services.retrieval.query import Filters, Mode, Query
from services.retrieval.routes import while_connected
from services.retrieval.service import NotReady, SearchService
from shared.records import Hit
from shared.settings import RetrievalSettings

FOLDER = Path(__file__).parent
PLACE: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
HITS = 10
LONGEST_FIELD = 1000
MODES: Mapping[Mode, str] = {"hybrid": "both", "dense": "meaning", "bm25": "words"}
TEXTS = ("q", "like", "mode", "k", "year_from", "year_to", "journal", "mesh", "type")


class WrongForm(ValueError):
    """A field of the form cannot be used; the text says which and what is expected."""


@dataclass(frozen=True)
class Shown:
    """What the page shows: the form's fields as given, and results or a problem."""

    fields: Mapping[str, str]
    hits: Sequence[Hit] | None = None
    heading: str = ""
    problem: str = ""


def page_routes(service: SearchService, limits: RetrievalSettings) -> APIRouter:
    """GET / and its style sheet; not part of the API's document."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page(request: Request) -> Response:
        fields = {name: request.query_params.get(name, "").strip()[: limits.max_query_chars + 1] for name in TEXTS}
        try:
            async with while_connected(request.receive):
                shown, status = await _found(service, limits, fields), 200
        except WrongForm as error:
            shown, status = Shown(fields, problem=str(error)), 422
        except (NotReady, Busy) as error:
            shown, status = Shown(fields, problem=f"{str(error)[:1].upper()}{str(error)[1:]}."), 503
        html = _template().render(shown=shown, modes=MODES, default=limits.mode, sentence=marked, hits_wanted=HITS)
        return HTMLResponse(html, status, headers=dict(PLACE))

    @router.get("/page.css")
    async def style() -> Response:
        return Response(_style(), media_type="text/css", headers={"Cache-Control": "max-age=3600"})

    return router


def query_of(fields: Mapping[str, str], limits: RetrievalSettings) -> Query:
    """The query that a filled form asks; raises WrongForm."""
    mode = fields["mode"] or limits.mode
    if mode not in get_args(Mode):
        raise WrongForm(f"The mode is {mode!r}; expected one of {', '.join(get_args(Mode))}.")
    if len(fields["q"]) > limits.max_query_chars:
        raise WrongForm(f"The question is too long; at most {limits.max_query_chars} characters can be searched.")
    return Query(
        fields["q"],
        _number(fields, "k", 1, limits.top_k_max) or min(HITS, limits.top_k_max),
        mode,  # type: ignore[arg-type]  # just checked
        highlight=True,
        filters=Filters(
            year_from=_number(fields, "year_from", 0, 9999),
            year_to=_number(fields, "year_to", 0, 9999),
            journals=_names(fields["journal"]),
            mesh_terms=_names(fields["mesh"]),
            publication_types=_names(fields["type"]),
        ),
    )


def marked(text: str, sentence: str) -> tuple[str, str, str]:
    """The text before the sentence, the sentence, and the text after it; all of it before when it is not in there."""
    before, found, after = text.partition(sentence) if sentence else (text, "", "")
    return before, found, after


async def _found(service: SearchService, limits: RetrievalSettings, fields: Mapping[str, str]) -> Shown:
    if fields["like"]:
        hits = await service.similar(service.engine, fields["like"], min(HITS, limits.top_k_max))
        if hits is None:
            return Shown(fields, problem=f"There is no paper with PMID {fields['like']} in this corpus.")
        return Shown(fields, hits, heading=f"Papers similar to PMID {fields['like']}")
    if not fields["q"]:
        return Shown(fields)
    ((*hits,),) = await service.search(service.engine, [query_of(fields, limits)])
    return Shown(fields, hits, heading=f"{len(hits)} {'paper' if len(hits) == 1 else 'papers'}")


def _number(fields: Mapping[str, str], name: str, least: int, most: int) -> int | None:
    text = fields[name]
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,6}", text) or not least <= int(text) <= most:
        raise WrongForm(f"{name} is {text[:20]!r}; expected a number from {least} to {most}.")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text[:LONGEST_FIELD].split(";") if name.strip())


@cache
def _template() -> Template:
    found = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return found.get_template("page.html")


@cache
def _style() -> bytes:
    return (FOLDER / "page.css").read_bytes()
