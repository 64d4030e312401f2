"""Results of queries in Redis, shared by all copies of the service; off, and no obstacle, while Redis is away.

Key: version of the index, settings that shape a ranking, and the query. Value: PMIDs with their scores and highlights
as JSON, about 80 bytes a hit; the papers themselves come from the corpus of that same version. When Redis does not
answer within `redis.timeout_s`, that is counted, logged once, and it is not asked again for AGAIN_S.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self, TypeVar

import structlog
from prometheus_client import Counter, Gauge
from pydantic import TypeAdapter, ValidationError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError

from services.retrieval.query import Query
from shared.metrics import REGISTRY, from_zero
from shared.records import Hit, Paper
from shared.settings import RetrievalSettings, Settings

FORMAT = 1  # raised when the same query and settings give another ranking or the value is written in another way
AGAIN_S = 10.0
CONNECTIONS = 8
# What shapes a ranking.
SHAPING: dict[str, Any] = dict.fromkeys(
    ("fusion", "dense_share", "candidates", "rerank_model", "rerank_candidates", "index"), True
) | {"encoder": {"query_dtype"}}

LOOKUPS = Counter(
    "drzero_retrieval_cache_lookups_total", "Queries looked up in Redis, by outcome.", ["outcome"], registry=REGISTRY
)
from_zero(LOOKUPS, "hit", "miss", "error")
UP = Gauge(
    "drzero_retrieval_cache_up", "Whether results are kept in Redis: 1, or 0 while it is away.", registry=REGISTRY
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Found:
    """A hit without its paper."""

    pmid: str
    score: float
    dense: float | None
    bm25: float | None
    highlight: str

    @classmethod
    def of(cls, hit: Hit) -> Self:
        """What is kept of a hit."""
        return cls(hit.paper.pmid, hit.score, hit.dense, hit.bm25, hit.highlight)

    def hit(self, paper: Paper) -> Hit:
        """The hit again."""
        return Hit(paper, self.score, self.dense, self.bm25, self.highlight)


KEPT: TypeAdapter[list[tuple[str, float, float | None, float | None, str]]] = TypeAdapter(
    list[tuple[str, float, float | None, float | None, str]]
)


class Cache:
    """Results of one installation. Lives in one event loop."""

    def __init__(self, redis: Redis, *, limit_s: float, ttl_s: int, shape: str) -> None:
        self._redis = redis
        self._limit_s = limit_s
        self._ttl_s = ttl_s
        self._shape = shape
        self._ask_from = 0.0
        self._up = True
        UP.set(1)

    async def get(self, version: str, queries: Sequence[Query]) -> list[list[Found] | None]:
        """What is kept of each query with that version of the index; None where nothing is."""
        kept = await self._try(lambda: self._redis.mget([self._key(version, query) for query in queries]))
        found = [_read(value) for value in kept or [None] * len(queries)]
        hits = sum(one is not None for one in found)
        LOOKUPS.labels("hit").inc(hits)
        LOOKUPS.labels("miss" if kept is not None else "error").inc(len(found) - hits)
        return found

    async def put(self, version: str, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> None:
        """Keep results."""
        pipeline = self._redis.pipeline(transaction=False)
        for query, found in zip(queries, hits, strict=True):
            values = [tuple(asdict(Found.of(hit)).values()) for hit in found]
            pipeline.set(self._key(version, query), KEPT.dump_json(values), ex=self._ttl_s)
        await self._try(pipeline.execute)

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def _try(self, command: Callable[[], Awaitable[T]]) -> T | None:
        """The reply, or None when Redis is away."""
        if time.monotonic() < self._ask_from:
            return None
        if not self._up:
            self._ask_from = time.monotonic() + AGAIN_S  # one request tries; the others need not wait for it
        try:
            async with asyncio.timeout(self._limit_s):
                reply = await command()
        except (RedisError, OSError, TimeoutError) as error:
            await self._note_away(error)
            return None
        self._note_back()
        return reply

    async def _note_away(self, error: Exception) -> None:
        self._ask_from = time.monotonic() + AGAIN_S
        await self._redis.connection_pool.disconnect(inuse_connections=False)  # those to a Redis that was restarted
        if self._up:
            self._up = False
            UP.set(0)
            problem = str(error) or type(error).__name__
            structlog.get_logger().warning(
                "redis does not answer; results are not kept", error=problem, again_s=AGAIN_S
            )

    def _note_back(self) -> None:
        if not self._up:
            self._up = True
            self._ask_from = 0.0
            UP.set(1)
            structlog.get_logger().info("redis answers again; results are kept")

    def _key(self, version: str, query: Query) -> str:
        asked = json.dumps([version, self._shape, canonical(query)])
        return f"drzero:search:{hashlib.sha256(asked.encode()).hexdigest()}"


def make_cache(settings: Settings) -> Cache | None:
    """The cache of this installation; None when the settings want none."""
    if settings.redis.url is None or not settings.retrieval.cache:
        return None
    limit_s = settings.redis.timeout_s
    pool = BlockingConnectionPool.from_url(
        settings.redis.url,
        max_connections=CONNECTIONS,
        timeout=limit_s,
        socket_timeout=limit_s,
        socket_connect_timeout=limit_s,
        retry=None,
    )
    return Cache(
        Redis.from_pool(pool), limit_s=limit_s, ttl_s=settings.retrieval.cache_ttl_s, shape=shape_of(settings.retrieval)
    )


def shape_of(settings: RetrievalSettings) -> str:
    """The settings that shape a ranking beside the query, as text."""
    values: dict[str, Any] = settings.model_dump(mode="json", include=SHAPING)
    return json.dumps([FORMAT, values], sort_keys=True)


def canonical(query: Query) -> dict[str, Any]:
    """The query in a form that is equal for queries which must find the same."""
    values = asdict(query)
    names = {key: value for key, value in values["filters"].items() if isinstance(value, tuple)}
    values["filters"] |= {key: sorted({name.casefold() for name in value}) for key, value in names.items()}
    return values


def _read(value: bytes | str | None) -> list[Found] | None:
    if value is None:
        return None
    try:
        return [Found(*item) for item in KEPT.validate_json(value)]
    except ValidationError:
        return None
