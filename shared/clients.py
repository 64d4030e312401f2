"""Async HTTP clients of the search and solver services, and the errors everybody else sees.

    ServiceError
    ├── Unavailable  nobody answered before the patience ended, or a 5xx that waiting does not mend
    │   └── Overdue  connected, but no whole reply before the patience ended
    ├── Refused      4xx: our request is wrong
    └── BadReply     a reply, but not the shape we expect

httpx's exceptions end here. Tried again is what passes by itself: 429, 503 and broken connections. The waits are 0.25,
0.5, 1, 2, 4, 5, 5 … s, each times a random 0.5 to 1.5, so that callers that failed together do not come back together.
A longer `Retry-After` (seconds or a date) takes the place of a wait, plus a random 0 to 0.25 s. A wait that would end
with no time left is not begun: no call, its waits included, lasts longer than its patience.

A service may have several addresses (`balance.py`). Requests are spread over them; one that fails, with any 5xx too, is
tried at once at the next address, and waits only when all have failed. So every request may be made twice. A failed
address is set aside, and asked in the background how it is before it takes part again.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar, Self

import httpx

from shared.access import token_headers
from shared.balance import Address, Balance, addresses_in
from shared.records import Completion, Hit, Paper

FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 5.0
SHORTEST_TRY_S = 0.05  # a shorter one would only hide why those before it failed
CONNECT_S = 5.0
PROBE_S = 5.0  # longest wait for an address to say how it is
KEEP_ALIVE_S = 4.0  # uvicorn hangs up on idle connections after 5 s; whoever lets go first must be us
RETRIED_STATUS = frozenset({429, 503})
JSON = {"Content-Type": "application/json"}
FINISHED = ("stop", "length", "tool_calls")


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
class _Request:
    """What is asked, the same at every address."""

    method: str
    path: str
    content: bytes | None


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why one try failed that may be made again; without an address when none could be asked."""

    address: Address | None
    problem: str
    after_s: float = 0.0  # the wait that the service asks for
    overdue: bool = False
    defect: bool = False  # waiting does not mend it, another address may


class ServiceClient:
    """Connections to one service, kept open and used again. Use as an async context manager.

    Each connection is an httpx client of its own: httpx's pool goes through all pairs of its connections for every
    request, which at 160 of them takes ten times as long as the requests.
    """

    PROBE: ClassVar = "/health"  # where a GET tells with status 200 that an address can take requests

    def __init__(
        self, service: str, urls: str, *, patience_s: float, timeout_s: float = 60.0, connections: int = 64
    ) -> None:
        """`urls` is one address or several separated by commas, which share the `connections`.

        `patience_s` bounds a call with all its tries, `timeout_s` one try, from the request to the whole reply.
        """
        self.service = service
        self.patience_s = patience_s
        self._balance = Balance(service, addresses_in(urls), self._look)
        self._timeout_s = timeout_s
        self._headers = token_headers()
        self._tls = httpx.create_ssl_context(trust_env=False)
        self._places = asyncio.Semaphore(connections)
        self._free: dict[Address, list[httpx.AsyncClient]] = {address: [] for address in self._balance.addresses}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the idle connections; those in use close when their call ends or is cancelled."""
        await self._balance.close()
        for free in self._free.values():
            while free:
                await free.pop().aclose()

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, patience_s: float | None = None
    ) -> Any:
        """The JSON of one request, within `patience_s` or the client's; raises Unavailable, Refused or BadReply."""
        patience = self.patience_s if patience_s is None else patience_s
        give_up = time.monotonic() + patience
        # Half a surrogate pair, which a model can write as \ud800, is no UTF-8: it is sent as "?".
        content = None if body is None else json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        request = _Request(method, path, content)
        wait = FIRST_WAIT_S
        while True:
            reply = await self._ask_around(request, give_up)
            if isinstance(reply, httpx.Response):
                return self._read(reply)
            if all(fault.defect for fault in reply):
                raise Unavailable(self.service, self._problems(reply))
            pause = max(wait * random.uniform(0.5, 1.5), self._asked_wait_s(reply))  # noqa: S311
            if time.monotonic() + pause + SHORTEST_TRY_S > give_up:
                error = Overdue if any(fault.overdue for fault in reply) else Unavailable
                asked = ", ".join(f"{address.url}{path}" for address in self._balance.addresses)
                raise error(self.service, f"{asked} gave no answer within {patience:.0f} s ({self._problems(reply)})")
            await asyncio.sleep(pause)
            wait = min(wait * 2, LONGEST_WAIT_S)

    async def _ask_around(self, request: _Request, give_up: float) -> httpx.Response | list[_Fault]:
        """The reply of the first address that gives one, or what was wrong at each that could be asked."""
        faults: list[_Fault] = []
        while True:
            tried = [fault.address for fault in faults]
            reply = await self._ask(request, tried, left_s=give_up - time.monotonic())
            if isinstance(reply, httpx.Response):
                return reply
            faults.append(reply)
            if time.monotonic() >= give_up or self._balance.choose([*tried, reply.address]) is None:
                return faults

    async def _ask(
        self, request: _Request, tried: Collection[Address | None], *, left_s: float
    ) -> httpx.Response | _Fault:
        """One try, at an address that is not among the `tried`."""
        limit = min(left_s, self._timeout_s)
        address = None
        try:
            async with asyncio.timeout(limit), self._places:
                # Not chosen before there is a place: until then addresses fail and come back.
                address = self._balance.choose(tried)
                if address is None:
                    return _Fault(None, "each asked for a longer wait")
                was_aside = address.aside
                reply = await self._send(address, request)
        except TimeoutError:
            if address is not None:
                self._note_silence(address, limit)
            return _Fault(address, f"no whole reply within {max(limit, 0):.1f} s", overdue=True)
        if isinstance(reply, _Fault):
            self._balance.set_aside(address, reply.problem, after_s=reply.after_s)
        else:
            address.succeed(was_aside=was_aside)
        return reply

    def _note_silence(self, address: Address, waited_s: float) -> None:
        # Whoever has little patience left says nothing about the address; but it may hang.
        if waited_s < self._timeout_s:
            self._balance.look_at(address)
        else:
            self._balance.set_aside(address, f"no whole reply within {waited_s:.1f} s")

    async def _send(self, address: Address, request: _Request) -> httpx.Response | _Fault:
        headers = self._headers | JSON if request.content else self._headers
        try:
            async with self._connection(address) as http:
                response = await http.request(request.method, request.path, content=request.content, headers=headers)
        except httpx.TransportError as error:
            return _Fault(address, f"{type(error).__name__} {error}".strip())
        except httpx.DecodingError as error:
            seen = f"{address.url}{request.path} sent a body that does not decode"
            raise BadReply(self.service, seen) from error
        return fault_told(address, response) or response

    async def _look(self, address: Address) -> str:
        """What is wrong with an address by its own account, "" for nothing."""
        try:
            # A connection of its own: it must not wait for a place behind requests.
            async with asyncio.timeout(PROBE_S), self._connect(address) as http:
                status = (await http.get(self.PROBE)).status_code
        except (TimeoutError, httpx.HTTPError) as error:
            return f"{self.PROBE} {type(error).__name__} {error}".strip()
        return "" if status == httpx.codes.OK else f"{self.PROBE} {status}"

    @asynccontextmanager
    async def _connection(self, address: Address) -> AsyncIterator[httpx.AsyncClient]:
        """The connection that was free last, or a new one; one that met an error is not used again."""
        free = self._free[address]
        connection = free.pop() if free else self._connect(address)
        address.in_flight += 1
        try:
            yield connection
        except BaseException:
            await connection.aclose()
            raise
        finally:
            address.in_flight -= 1
        free.append(connection)

    def _connect(self, address: Address) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=address.url,
            # httpx bounds each read by itself: a server that trickles would never be too slow. See _ask.
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=1, keepalive_expiry=KEEP_ALIVE_S),
            trust_env=False,  # a proxy variable must not catch calls between our own services
            verify=self._tls,
        )

    def _asked_wait_s(self, faults: Sequence[_Fault]) -> float:
        """The time until an address may be asked again, plus a random bit; 0 when one is free of any wait."""
        alone = len(self._balance.addresses) == 1
        asked_s = faults[-1].after_s if alone else self._balance.opens_in_s()
        return asked_s + random.uniform(0, FIRST_WAIT_S) if asked_s > 0 else 0.0  # noqa: S311

    def _problems(self, faults: Sequence[_Fault]) -> str:
        if len(self._balance.addresses) == 1:
            return faults[-1].problem
        return "; ".join(f"{f.address.url}: {f.problem}" if f.address else f.problem for f in faults)

    def _read(self, response: httpx.Response) -> Any:
        if response.is_success:
            try:
                return response.json()
            except (ValueError, RecursionError) as error:
                raise BadReply(self.service, f"expected JSON, got {response.text[:200]!r}") from error
        seen = f"{response.request.url.path} {response.status_code}: {response.text[:500]}"
        if response.status_code >= 400:
            raise Refused(self.service, seen)
        raise BadReply(self.service, f"expected status 200, got {seen}")


class SearchClient(ServiceClient):
    """Client of the retrieval service."""

    PROBE = "/ready"

    def __init__(self, urls: str, *, patience_s: float, connections: int = 64) -> None:
        super().__init__("retrieval", urls, patience_s=patience_s, connections=connections)

    async def search(self, queries: list[str], top_k: int, *, patience_s: float | None = None) -> list[list[Hit]]:
        """Hits per query, best first, in the order of `queries`."""
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

    def __init__(self, urls: str, *, patience_s: float, connections: int = 64) -> None:
        super().__init__("solver", urls, patience_s=patience_s, timeout_s=300.0, connections=connections)

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


def fault_told(address: Address, response: httpx.Response) -> _Fault | None:
    """The fault that a reply tells: busy (429, 503) or a defect (any other 5xx); None for a reply to be read."""
    status = response.status_code
    if status in RETRIED_STATUS:
        after_s = retry_after_s(response.headers.get("retry-after", ""), datetime.now(UTC))
        return _Fault(address, f"status {status}: {response.text[:200]}", after_s=after_s)
    if status >= 500:
        return _Fault(address, f"{response.request.url.path} {status}: {response.text[:500]}", defect=True)
    return None


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
