"""Calls to NCBI's E-utilities through Bio.Entrez: base address, time limit, pace, retries and error replies.

In: the name of a utility and its parameters. Out: the body of a reply that a given reader accepts. Errors are those of
`shared.clients`: Unavailable (no good reply after all tries), Refused (4xx) and BadReply (200, but not what was asked,
after all tries). Calls may come from many threads; `pace` spaces them, tries included, and a `Retry-After` stops all of
them. The retries are ours, because Bio.Entrez repeats a 429 at once and knows neither `Retry-After` nor an error inside
a 200. The key never leaves the request: it is cut out of every text that could reach a log, since NCBI's own error
replies echo it.
"""

import http.client
import random
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.error import HTTPError

import structlog
from Bio import Entrez

from services.ingest.pace import Pace
from services.ingest.pubmed_xml import Element, MalformedXml, read_reply
from shared.clients import BadReply, Refused, ServiceError, Unavailable, retry_after_s

SERVICE = "NCBI E-utilities"
HOME = "https://eutils.ncbi.nlm.nih.gov/entrez/eutils"  # written into the functions of Bio.Entrez
FIRST_WAIT_S = 1.0
LONGEST_STEP_S = 60.0  # up to which waits double
LONGEST_WAIT_S = 600.0  # NCBI blocks a client for longer than that only on purpose
RETRY_BUDGET = 1000
RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})
REQUEST: ContextVar[str] = ContextVar("REQUEST")  # the name of the request that this thread is about to send
T = TypeVar("T")


class ErrorReply(ValueError):
    """A 200 whose body says that something went wrong, in NCBI's words."""


@dataclass(frozen=True)
class Caller:
    """Who calls, at which pace, and how patiently.

    `retries` is what is left to the run, over all calls. `sleep` waits between tries and says True when the run ends.
    """

    base_url: str
    contact: str
    key: str | None
    timeout_s: float
    tries: int
    pace: Pace
    retries: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(RETRY_BUDGET))
    sleep: Callable[[float], bool | None] = time.sleep
    first_wait_s: float = FIRST_WAIT_S


class _Fault(Exception):
    """Why one try failed that may be made again; `failed` is the error when it is not."""

    def __init__(self, problem: str, failed: type[ServiceError] = Unavailable, after: str | None = None) -> None:
        super().__init__(problem)
        self.failed = failed
        self.after_s = retry_after_s(after or "", datetime.now(UTC))


@contextmanager
def configured(caller: Caller) -> Iterator[None]:
    """Bio.Entrez, which is configured by its module's globals, set up for this caller inside the block.

    Bio.Entrez has no setting for the base address or a time limit, and its own pause between calls is neither safe
    between threads nor to be switched off. All three live in the one function that opens the requests it has built, so
    that function is ours inside the block.
    """
    names = ("email", "tool", "api_key", "_open")
    before = {name: getattr(Entrez, name) for name in names}
    opener = urllib.request.build_opener(*_noting(caller.pace))

    def opened(request: urllib.request.Request) -> Any:
        request.full_url = caller.base_url.rstrip("/") + request.full_url.removeprefix(HOME)
        return opener.open(request, timeout=caller.timeout_s)

    for name, value in zip(names, (caller.contact, "drzero-biomedical", caller.key, opened), strict=True):
        setattr(Entrez, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(Entrez, name, value)


def _noting(pace: Pace) -> list[urllib.request.BaseHandler]:
    """Handlers whose connections tell the pace when a request has been written."""

    class Plain(http.client.HTTPConnection):
        def getresponse(self) -> http.client.HTTPResponse:
            pace.sent(REQUEST.get())
            return super().getresponse()

    class Encrypted(http.client.HTTPSConnection):
        def getresponse(self) -> http.client.HTTPResponse:
            pace.sent(REQUEST.get())
            return super().getresponse()

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Plain, request)

    class EncryptedHandler(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Encrypted, request)

    return [PlainHandler(), EncryptedHandler()]


def call(caller: Caller, utility: Callable[..., Any], parameters: dict[str, Any], read: Callable[[bytes], T]) -> T:
    """What `read` makes of the reply of one utility (`Entrez.esearch`, …); inside `configured()` only.

    `read` raises MalformedXml or ErrorReply for a body that is not what was asked; that is tried again too, because
    NCBI sends maintenance pages, back-end errors and cut-off bodies with status 200.
    """
    step = caller.first_wait_s
    for left in range(caller.tries - 1, -1, -1):
        request = uuid.uuid4().hex
        while wait := caller.pace.take(request):
            _sleep(caller, wait)
        REQUEST.set(request)
        try:
            return _once(caller, utility, parameters, read)
        except _Fault as fault:
            if not left:
                text = f"no usable reply in {caller.tries} tries; the last one: {fault}"
                raise fault.failed(SERVICE, text) from None
            _wait_after(caller, fault, step, left)
        finally:
            caller.pace.sent(request)  # one that came to nothing must not count for ever
        step = min(2 * step, LONGEST_STEP_S)
    raise AssertionError("caller.tries is at least 1")


def _once(caller: Caller, utility: Callable[..., Any], parameters: dict[str, Any], read: Callable[[bytes], T]) -> T:
    try:
        with utility(**parameters) as handle:
            return read(handle.read())
    except HTTPError as error:
        with error:
            problem = _clean(f"status {error.code}: {_text(error)}", caller.key)
        if error.code not in RETRIED_STATUS:
            raise Refused(SERVICE, problem) from None
        raise _Fault(problem, after=error.headers.get("Retry-After")) from None
    except (MalformedXml, ErrorReply) as error:
        raise _Fault(_clean(str(error), caller.key), BadReply) from None
    except (OSError, http.client.HTTPException) as error:  # no connection, time limit, cut-off body
        raise _Fault(_clean(f"{type(error).__name__} {error}", caller.key)) from None


def _text(error: HTTPError) -> str:
    try:
        return error.read().decode("utf-8", "replace")[:1000]
    except (OSError, http.client.HTTPException) as cut:  # it says neither what is wrong nor whose mistake it is
        raise _Fault(f"status {error.code} {type(cut).__name__}") from None


def _wait_after(caller: Caller, fault: _Fault, step: float, left: int) -> None:
    """Wait for the next try: all callers when NCBI names a time, else this one."""
    if not caller.retries.acquire(blocking=False):
        raise Unavailable(SERVICE, f"failed too often in this run (DRZERO_INGEST__ENTREZ_RETRY_BUDGET): {fault}")
    pause = fault.after_s or step * random.uniform(0.75, 1.25)  # noqa: S311
    if pause > LONGEST_WAIT_S:
        raise Unavailable(SERVICE, f"asks to wait for {pause:.0f} s ({fault}); run again then")
    structlog.get_logger().warning(
        "a call to NCBI failed and is tried again", problem=str(fault), wait_s=round(pause, 1), left=left
    )
    if fault.after_s:
        caller.pace.hold(pause)
    else:
        _sleep(caller, pause)


def _sleep(caller: Caller, seconds: float) -> None:
    if caller.sleep(seconds):
        raise Unavailable(SERVICE, "is not asked any more, because the run ends")


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


def _line(body: bytes) -> str:
    return repr(" ".join(body[:120].decode("utf-8", "replace").split()))


def _clean(text: str, key: str | None) -> str:
    return " ".join((text.replace(key, "***") if key else text).split())
