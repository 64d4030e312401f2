"""Async HTTP clients of the search and solver services, and the three errors everybody else sees.

    ServiceError
    ├── Unavailable  nobody answered, or 429/5xx, until the patience was used up: wait or restart the service
    ├── Refused      4xx: our request is wrong
    └── BadReply     200, but not the shape we expect

httpx's exceptions end here. Retries happen for Unavailable causes only, with exponential back-off and jitter,
honouring `Retry-After`, until `patience_s` has passed.
"""

import asyncio
import random
import time
from typing import Any, Self

import httpx

from shared.records import Completion, Hit, Paper

FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 5.0
RETRIED_STATUS = frozenset({429, 500, 502, 503, 504})


class ServiceError(RuntimeError):
    """A call to a service failed; `service` names it."""

    def __init__(self, service: str, text: str) -> None:
        super().__init__(f"{service}: {text}")
        self.service = service


class Unavailable(ServiceError):
    """The service did not answer in time; the request was fine."""


class Refused(ServiceError):
    """The service rejected the request (4xx)."""


class BadReply(ServiceError):
    """The service answered with something we cannot read."""


class ServiceClient:
    """One connection pool to one service. Use as an async context manager."""

    def __init__(
        self, service: str, base_url: str, *, patience_s: float, timeout_s: float = 60.0, connections: int = 64
    ) -> None:
        self.service = service
        self.base_url = base_url.rstrip("/")
        self.patience_s = patience_s
        self._http = httpx.AsyncClient(
            base_url=self.base_url,
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=False,  # a proxy variable must not catch calls between our own services
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON of one request; raises Unavailable, Refused or BadReply."""
        give_up = time.monotonic() + self.patience_s
        wait = FIRST_WAIT_S
        while True:
            try:
                response = await self._http.request(method, path, json=body)
            except httpx.TransportError as error:
                problem, after = f"{type(error).__name__} {error}".strip(), None
            except httpx.DecodingError as error:
                raise BadReply(self.service, f"{self.base_url}{path} sent a body that does not decode") from error
            else:
                if response.status_code not in RETRIED_STATUS:
                    return self._read(response)
                problem = f"status {response.status_code}: {response.text[:200]}"
                after = response.headers.get("retry-after")
            pause = max(float(after), FIRST_WAIT_S) if after and after.isdigit() else wait * random.uniform(0.5, 1.5)  # noqa: S311
            if time.monotonic() + pause > give_up:
                raise Unavailable(
                    self.service, f"{self.base_url}{path} gave no answer within {self.patience_s:.0f} s ({problem})"
                )
            await asyncio.sleep(pause)
            wait = min(wait * 2, LONGEST_WAIT_S)

    def _read(self, response: httpx.Response) -> Any:
        if response.status_code >= 400:
            raise Refused(self.service, f"{response.request.url.path} {response.status_code}: {response.text[:500]}")
        try:
            return response.json()
        except ValueError as error:
            raise BadReply(self.service, f"expected JSON, got {response.text[:200]!r}") from error


class SearchClient(ServiceClient):
    """Client of the retrieval service."""

    def __init__(self, base_url: str, *, patience_s: float, connections: int = 64) -> None:
        super().__init__("retrieval", base_url, patience_s=patience_s, connections=connections)

    async def search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        """Hits per query, best first, in the order of `queries`."""
        reply = await self.call("POST", "/search", {"queries": queries, "top_k": top_k})
        try:
            results = [
                [Hit(paper_of(hit["document"]), float(hit["score"])) for hit in one["hits"]] for one in reply["results"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise BadReply(self.service, f"/search lacks {error}") from error
        if len(results) != len(queries):
            raise BadReply(self.service, f"/search gave {len(results)} results for {len(queries)} queries")
        return results


class SolverClient(ServiceClient):
    """Client of the solver service (OpenAI-compatible)."""

    def __init__(self, base_url: str, *, patience_s: float, connections: int = 64) -> None:
        super().__init__("solver", base_url, patience_s=patience_s, timeout_s=300.0, connections=connections)

    async def chat(self, body: dict[str, Any]) -> Completion:
        """One reply of `POST /v1/chat/completions`."""
        reply = await self.call("POST", "/v1/chat/completions", body)
        try:
            choice, usage = reply["choices"][0], reply["usage"]
            return Completion(
                text=choice["message"]["content"] or "",
                finish_reason=choice["finish_reason"],
                prompt_tokens=usage["prompt_tokens"],
                new_tokens=usage["completion_tokens"],
            )
        except (KeyError, IndexError, TypeError) as error:
            raise BadReply(self.service, f"/v1/chat/completions lacks {error}") from error


def paper_of(record: dict[str, Any]) -> Paper:
    """A paper from a corpus record; raises KeyError on a missing key."""
    return Paper(
        pmid=record["pmid"],
        title=record["title"],
        abstract=record["abstract"],
        authors=tuple(record["authors"]),
        journal=record["journal"],
        pub_date=record["pub_date"],
        mesh_terms=tuple(record["mesh_terms"]),
        doi=record["doi"],
    )
