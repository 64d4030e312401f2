"""Progress of a long stage: a bar on a terminal (log lines elsewhere), and a hash in Redis when there is one.

The Redis key `drzero:progress:<stage>` holds done, total (0 when unknown), seconds and updated (Unix time). Redis
never stops a stage: when it does not answer, that is logged once and progress goes on without it.
"""

import sys
import time
from types import TracebackType
from typing import Any, Self

import redis
import structlog
from tqdm import tqdm

from shared.settings import Settings

UPDATE_S = 0.5  # at most two Redis writes a second
LOG_S = 20.0  # where there is no terminal, one line so often


class Progress:
    """Counts a stage's units of work. Use as a context manager."""

    def __init__(self, stage: str, settings: Settings, *, total: int | None = None, unit: str = "paper") -> None:
        self.stage = stage
        self.total = total
        self.done = 0
        self._started = time.monotonic()
        self._last = 0.0
        self._logged = self._started
        self._unit = unit
        self._bar = tqdm(total=total, desc=stage, unit=unit, disable=not sys.stderr.isatty())
        self._redis: redis.Redis | None = None
        if settings.redis.url:
            limit = settings.redis.timeout_s
            self._redis = redis.Redis.from_url(
                settings.redis.url, socket_timeout=limit, socket_connect_timeout=limit, retry=None
            )

    def __enter__(self) -> Self:
        self._publish()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._bar.close()
        self._publish()
        if self._redis is not None:
            self._redis.close()

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self.done += count
        self._bar.update(count)
        if time.monotonic() - self._last >= UPDATE_S:
            self._publish()
        if self._bar.disable and time.monotonic() - self._logged >= LOG_S:
            self._logged = time.monotonic()
            rate = self.done / (self._logged - self._started)
            structlog.get_logger().info(
                f"{self.stage} goes on",
                done=self.done,
                total=self.total,
                unit=self._unit,
                per_second=round(rate, 1),
                seconds_left=round((self.total - self.done) / rate) if self.total and rate else None,
            )

    def _publish(self) -> None:
        self._last = time.monotonic()
        if self._redis is None:
            return
        values: dict[Any, Any] = {
            "done": self.done,
            "total": self.total or 0,
            "seconds": round(self._last - self._started, 1),
            "updated": round(time.time(), 1),
        }
        try:
            self._redis.hset(f"drzero:progress:{self.stage}", mapping=values)
        except redis.RedisError as error:
            structlog.get_logger().warning("redis does not answer; progress goes on without it", error=str(error))
            self._redis = None
