"""Calls to NCBI's E-utilities through Bio.Entrez: base address, time limit, retries and error replies.

In: the name of a utility and its parameters. Out: the body of a reply that a given reader accepts. Errors are those of
`shared.clients`: Unavailable (no good reply after all tries), Refused (4xx), BadReply (200, but not what was asked,
after all tries). Bio.Entrez keeps its own pace of calls (3 a second, 10 with a key); the retries are ours, because
Bio.Entrez repeats a 429 at once and knows neither `Retry-After` nor an error inside a 200. The key never leaves the
request: it is cut out of every text that could reach a log, since NCBI's own error replies echo it.
"""

import email.utils
import http.client
import random
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.error import HTTPError

import structlog
from Bio import Entrez

from services.ingest.pubmed_xml import Element, MalformedXml, read_reply
from shared.clients import BadReply, Refused, Unavailable

SERVICE = "NCBI E-utilities"
HOME = "https://eutils.ncbi.nlm.nih.gov/entrez/eutils"  # written into the functions of Bio.Entrez
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 600.0  # NCBI blocks a client for longer than that only on purpose
RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})
T = TypeVar("T")


class ErrorReply(ValueError):
    """A 200 whose body says that something went wrong, in NCBI's words."""


@dataclass(frozen=True)
class Caller:
    """Who calls, and how patiently. `sleep` waits between tries."""

    base_url: str
    contact: str
    key: str | None
    timeout_s: float
    tries: int
    sleep: Callable[[float], None] = time.sleep


class _Direct(urllib.request.BaseHandler):
    """Sends Bio.Entrez's calls to another base address and gives them a time limit.

    Bio.Entrez has neither setting: the address is a constant in each of its functions, and it opens the request without
    a timeout. urllib's opener is the public place where both can be said without copying or patching Bio.Entrez.
    """

    handler_order = 100  # before urllib's own handler writes the Host header

    def __init__(self, base_url: str, timeout_s: float) -> None:
        self.base_url = base_url.rstrip("/")
        self.timeout_s = timeout_s

    def https_request(self, request: urllib.request.Request) -> urllib.request.Request:
        if request.full_url.startswith(HOME):
            request.full_url = self.base_url + request.full_url.removeprefix(HOME)
            request.timeout = self.timeout_s
        return request


@contextmanager
def configured(caller: Caller) -> Iterator[None]:
    """Bio.Entrez, which is configured by its module's globals, set up for this caller inside the block."""
    before = (Entrez.email, Entrez.tool, Entrez.api_key, Entrez.max_tries)
    opener = urllib.request._opener  # type: ignore[attr-defined]  # urllib has a setter for it, but no getter
    urllib.request.install_opener(urllib.request.build_opener(_Direct(caller.base_url, caller.timeout_s)))
    Entrez.email, Entrez.tool, Entrez.api_key, Entrez.max_tries = caller.contact, "drzero-biomedical", caller.key, 1
    try:
        yield
    finally:
        Entrez.email, Entrez.tool, Entrez.api_key, Entrez.max_tries = before
        urllib.request.install_opener(opener)


def call(caller: Caller, utility: Callable[..., Any], parameters: dict[str, Any], read: Callable[[bytes], T]) -> T:
    """What `read` makes of the reply of one utility (`Entrez.esearch`, …); inside `configured()` only.

    `read` raises MalformedXml or ErrorReply for a body that is not what was asked; that is tried again too, because
    NCBI sends maintenance pages, back-end errors and cut-off bodies with status 200.
    """
    log = structlog.get_logger()
    wait = FIRST_WAIT_S
    for left in range(caller.tries - 1, -1, -1):
        failed: type[Unavailable] | type[BadReply] = Unavailable
        after = None
        try:
            with utility(**parameters) as handle:
                body = handle.read()
            return read(body.encode() if isinstance(body, str) else body)
        except HTTPError as error:
            with error:
                text = _clean(error.read(500).decode("utf-8", "replace"), caller.key)
                problem, after = f"status {error.code}: {text}", error.headers.get("Retry-After")
            if error.code not in RETRIED_STATUS:
                raise Refused(SERVICE, problem) from None
        except (MalformedXml, ErrorReply) as error:
            problem, failed = _clean(str(error), caller.key), BadReply
        except (OSError, http.client.HTTPException) as error:  # no connection, time limit, cut-off body
            problem = _clean(f"{type(error).__name__} {error}", caller.key)
        if not left:
            raise failed(SERVICE, f"no usable reply in {caller.tries} tries; the last one: {problem}")
        pause = retry_after(after) or wait * random.uniform(0.75, 1.25)  # noqa: S311
        if pause > LONGEST_WAIT_S:
            raise Unavailable(SERVICE, f"asks to wait for {pause:.0f} s ({problem}); run again then")
        log.warning("a call to NCBI failed and is tried again", problem=problem, wait_s=round(pause, 1), left=left)
        caller.sleep(pause)
        wait *= 2
    raise AssertionError("caller.tries is at least 1")


def reply_root(body: bytes, expected: str) -> Element:
    """The root of an XML reply; ErrorReply when it is HTML or holds NCBI's ERROR elements instead."""
    start = body[:200].lstrip().lower()
    if start.startswith((b"<html", b"<!doctype html")):
        raise ErrorReply(f"HTML where XML was asked: {_line(body)}")
    try:
        root = read_reply(body)
    except MalformedXml as error:
        raise ErrorReply(f"expected <{expected}>, got {_line(body)} ({error.reason})") from error
    errors = [" ".join("".join(e.itertext()).split()) for e in root.iter("ERROR")]
    if errors:
        raise ErrorReply("; ".join(errors))
    if root.tag != expected:
        raise ErrorReply(f"expected <{expected}>, got <{root.tag}>")
    return root


def retry_after(value: str | None) -> float | None:
    """Seconds of a `Retry-After` header, a number or an HTTP date; None when there is none or it is unreadable."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _line(body: bytes) -> str:
    return repr(" ".join(body[:120].decode("utf-8", "replace").split()))


def _clean(text: str, key: str | None) -> str:
    return " ".join((text.replace(key, "***") if key else text).split())
