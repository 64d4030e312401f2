"""What every request passes on its way in and out, as one ASGI middleware: id, size limit, headers, metrics, defects.

A request keeps the `X-Request-ID` that it came with (up to 64 letters, digits and `.:_-`) or gets one; the reply has it
as a header, an error also in its body. A body above the limit is refused before it is read. What nobody expected is
a 500 and a line in the log.
"""

import re
import secrets
import time
from collections.abc import Iterable

import structlog
from prometheus_client import Counter, Histogram
from pydantic_core import to_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.retrieval.batching import REJECTIONS
from shared.metrics import REGISTRY, SECONDS

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
GONE = 499  # nginx's status for a client that hung up; nobody reads it but the metrics

REQUESTS = Counter("drzero_retrieval_requests_total", "Requests answered.", ["route", "status"], registry=REGISTRY)
REQUEST_SECONDS = Histogram(
    "drzero_retrieval_request_seconds", "Time of a request.", ["route"], buckets=SECONDS, registry=REGISTRY
)


class TooLarge(RuntimeError):
    """The body of a request is above the limit."""


class Border:
    """The middleware around the app; `most_bytes` is the largest body that is read."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app = app
        self._most_bytes = most_bytes
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0
        given, length = _told(scope["headers"])
        name = scope.setdefault("state", {})["request_id"] = given or secrets.token_hex(8)
        added = [(b"x-request-id", name.encode()), (b"x-content-type-options", b"nosniff")]

        async def pass_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        try:
            if length is None:
                await self._app(scope, self._bounded(receive), pass_on)
            elif length <= self._most_bytes:
                await self._app(scope, receive, pass_on)
            else:
                await _reply(pass_on, 413, self.refusal, name)
        except Exception as error:
            self._log.error("a request failed", request_id=name, path=scope["path"], error=repr(error))
            if not status:
                await _reply(pass_on, 500, "the search failed; the service's log says why", name)
            raise
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            REQUESTS.labels(route, str(status or GONE)).inc()
            REQUEST_SECONDS.labels(route).observe(time.perf_counter() - started)
            if status == 413:
                REJECTIONS.labels("too large").inc()

    @property
    def refusal(self) -> str:
        """What the sender of a larger body reads."""
        return f"the body is larger than {self._most_bytes} bytes; send fewer queries at a time"

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` for a body of unknown length."""
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most_bytes:
                raise TooLarge(self.refusal)
            return message

        return bounded


def _told(headers: Iterable[tuple[bytes, bytes]]) -> tuple[str, int | None]:
    """The request's id, or "", and the length of its body; None when that is not told."""
    name, length = "", None
    chunked = False
    for key, value in headers:
        if key == b"x-request-id" and REQUEST_ID.fullmatch(value):
            name = value.decode()
        elif key == b"content-length" and value.isdigit():
            length = int(value)
        elif key == b"transfer-encoding":
            chunked = True
    return name, None if chunked else length


async def _reply(send: Send, status: int, detail: str, request_id: str) -> None:
    body = to_json({"detail": detail, "request_id": request_id})
    # The connection is of no further use: what is left of the request may still be on it.
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
