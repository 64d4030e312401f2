"""Async HTTP clients of the search and solver services, and the errors everybody else sees.

    ServiceError
    ├── Unavailable  nobody answered before the patience ended, or a 5xx that waiting does not mend
    │   └── Overdue  connected, but no whole reply before the patience ended
    ├── Refused      4xx: our request is wrong
    └── BadReply     a reply, but not the shape we expect

httpx's exceptions end here. Tried again is what passes by itself: 429, 503 and broken connections. The waits are 0.25,
0.5, 1, 2, 4, 5, 5 … s, each times a random 0.5 to 1.5, so that callers that failed together do not come back together.
A longer `Retry-After` (seconds or a date) takes the place of a wait, plus a random 0 to 0.25 s. A wait that would end
after the patience is not begun: no call, its waits included, lasts longer than its patience.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self

import httpx

from shared.records import Completion, Hit, Paper

FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 5.0
CONNECT_S = 5.0
KEEP_ALIVE_S = 4.0  # uvicorn hangs up on idle connections after 5 s; whoever lets go first must be us
RETRIED_STATUS = frozenset({429, 503})
FINISHED = ("stop", "length", "tool_calls")
JSON = {"Content-Type": "application/json"}


class ServiceError(RuntimeError):
    """A call to a service failed; `service` names it."""

    def __init__(self, service: str, text: str) -> None:
        super().__init__(f"{service}: {text}")
        self.service = service


class Unavailable(ServiceError):
    """The service did not answer in time, or failed on a request that was fine."""


class Overdue(Unavailable):
    """The service was still silent, or still sending, when the patience ended."""


class Refused(ServiceError):
    """The service rejected the request (4xx)."""


class BadReply(ServiceError):
    """The service answered with something we cannot read."""


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why one try failed that may be made again; `after_s` is the wait that the service asks for."""

    problem: str
    after_s: float = 0.0
    overdue: bool = False


class ServiceClient:
    """Connections to one service, kept open and used again. Use as an async context manager.

    Each connection is an httpx client of its own: httpx's pool goes through all pairs of its connections for every
    request, which at 160 of them takes ten times as long as the requests.
    """

    def __init__(
        self, service: str, base_url: str, *, patience_s: float, timeout_s: float = 60.0, connections: int = 64
    ) -> None:
        """`patience_s` bounds a call with all its tries, `timeout_s` one try, from the request to the whole reply."""
        self.service = service
        self.base_url = base_url.rstrip("/")
        self.patience_s = patience_s
        self._timeout_s = timeout_s
        self._tls = httpx.create_ssl_context(trust_env=False)
        self._places = asyncio.Semaphore(connections)
        self._free: list[httpx.AsyncClient] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the idle connections; those in use close when their call ends or is cancelled."""
        while self._free:
            await self._free.pop().aclose()

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, patience_s: float | None = None
    ) -> Any:
        """The JSON of one request, within `patience_s` or the client's; raises Unavailable, Refused or BadReply."""
        patience = self.patience_s if patience_s is None else patience_s
        give_up = time.monotonic() + patience
        # Half a surrogate pair, which a model can write as \ud800, is no UTF-8: it is sent as "?".
        content = None if body is None else json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        wait = FIRST_WAIT_S
        while True:
            reply = await self._ask(method, path, content, left_s=give_up - time.monotonic())
            if isinstance(reply, httpx.Response):
                return self._read(reply)
            pause = max(wait * random.uniform(0.5, 1.5), reply.after_s)  # noqa: S311
            if time.monotonic() + pause > give_up:
                error = Overdue if reply.overdue else Unavailable
                raise error(
                    self.service, f"{self.base_url}{path} gave no answer within {patience:.0f} s ({reply.problem})"
                )
            await asyncio.sleep(pause)
            wait = min(wait * 2, LONGEST_WAIT_S)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[httpx.AsyncClient]:
        """The connection that was free last, or a new one; one that met an error is not used again."""
        async with self._places:
            connection = self._free.pop() if self._free else self._connect()
            try:
                yield connection
            except BaseException:
                await connection.aclose()
                raise
            self._free.append(connection)

    def _connect(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.base_url,
            # httpx bounds each read by itself: a server that trickles would never be too slow. See _ask.
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=1, keepalive_expiry=KEEP_ALIVE_S),
            trust_env=False,  # a proxy variable must not catch calls between our own services
            verify=self._tls,
        )

    async def _ask(self, method: str, path: str, content: bytes | None, *, left_s: float) -> httpx.Response | _Fault:
        """One try."""
        limit = min(left_s, self._timeout_s)
        try:
            async with asyncio.timeout(limit), self._connection() as http:
                response = await http.request(method, path, content=content, headers=JSON if content else None)
        except TimeoutError:
            return _Fault(f"no whole reply within {max(limit, 0):.1f} s", overdue=True)
        except httpx.TransportError as error:
            return _Fault(f"{type(error).__name__} {error}".strip())
        except httpx.DecodingError as error:
            raise BadReply(self.service, f"{self.base_url}{path} sent a body that does not decode") from error
        if response.status_code in RETRIED_STATUS:
            asked = retry_after_s(response.headers.get("retry-after", ""), datetime.now(UTC))
            after = asked + random.uniform(0, FIRST_WAIT_S) if asked > 0 else 0.0  # noqa: S311
            return _Fault(f"status {response.status_code}: {response.text[:200]}", after_s=after)
        return response

    def _read(self, response: httpx.Response) -> Any:
        if response.is_success:
            try:
                return response.json()
            except (ValueError, RecursionError) as error:
                raise BadReply(self.service, f"expected JSON, got {response.text[:200]!r}") from error
        status = response.status_code
        seen = f"{response.request.url.path} {status}: {response.text[:500]}"
        if status >= 500:
            raise Unavailable(self.service, seen)
        if status >= 400:
            raise Refused(self.service, seen)
        raise BadReply(self.service, f"expected status 200, got {seen}")


class SearchClient(ServiceClient):
    """Client of the retrieval service."""

    def __init__(self, base_url: str, *, patience_s: float, connections: int = 64) -> None:
        super().__init__("retrieval", base_url, patience_s=patience_s, connections=connections)

    async def search(self, queries: list[str], top_k: int, *, patience_s: float | None = None) -> list[list[Hit]]:
        """Hits per query, best first, in the order of `queries`; of a query the first 1,000 characters count."""
        body = {"queries": queries, "top_k": top_k}
        reply = await self.call("POST", "/search", body, patience_s=patience_s)
        try:
            results = [
                [Hit(paper_of(hit["document"]), float(hit["score"])) for hit in one["hits"]] for one in reply["results"]
            ]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BadReply(self.service, f"/search lacks {error}") from error
        if len(results) != len(queries):
            raise BadReply(self.service, f"/search gave {len(results)} results for {len(queries)} queries")
        return results


class SolverClient(ServiceClient):
    """Client of the solver service (OpenAI-compatible)."""

    def __init__(self, base_url: str, *, patience_s: float, connections: int = 64) -> None:
        super().__init__("solver", base_url, patience_s=patience_s, timeout_s=300.0, connections=connections)

    async def chat(self, body: dict[str, Any], *, patience_s: float | None = None) -> Completion:
        """One reply of `POST /v1/chat/completions`."""
        reply = await self.call("POST", "/v1/chat/completions", body, patience_s=patience_s)
        try:
            choice, usage = reply["choices"][0], reply["usage"]
            return Completion(
                text=_text(choice["message"]["content"] or ""),
                finish_reason=_finished(choice["finish_reason"]),
                prompt_tokens=int(usage["prompt_tokens"]),
                new_tokens=int(usage["completion_tokens"]),
            )
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise BadReply(self.service, f"/v1/chat/completions lacks {error}") from error


def retry_after_s(header: str, now: datetime) -> float:
    """The wait that a `Retry-After` header asks for, in seconds: a number or an HTTP date; 0 for anything else."""
    if header.isascii() and header.isdigit():
        return float(header)
    try:
        until = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - now).total_seconds())


def paper_of(record: dict[str, Any]) -> Paper:
    """A paper from a corpus record; raises KeyError on a missing key, TypeError or ValueError on another type."""
    return Paper(
        pmid=_text(record["pmid"]),
        title=_text(record["title"]),
        abstract=_text(record["abstract"]),
        authors=tuple(record["authors"]),
        journal=_text(record["journal"]),
        pub_date=_text(record["pub_date"]),
        mesh_terms=tuple(record["mesh_terms"]),
        doi=_text(record["doi"]),
    )


def _finished(reason: Any) -> str:
    """The finish reason of a whole reply; ValueError for "abort" and the like, which say that the server gave up."""
    if reason not in FINISHED:
        raise ValueError(f"a finished reply: finish_reason is {reason!r}, expected one of {', '.join(FINISHED)}")
    return str(reason)


def _text(value: object) -> str:
    """`value` if it is text that can be written as UTF-8; raises TypeError or ValueError (half a surrogate pair)."""
    if not isinstance(value, str):
        raise TypeError(f"text, got {str(value)[:80]}")
    value.encode()
    return value
