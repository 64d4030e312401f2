"""How fast NCBI is asked: at most `rate` requests in any second, over all threads and over machines with one Redis.

`take()` says how long to wait before asking again; 0 means that the request may go now and is counted. `sent()` moves
its count to the moment at which it has been written, because a connection or a busy machine can hold it up for longer
than a second. `hold()` stops everybody for a while (`Retry-After`). With Redis, all three go through one script that
reads Redis' own clock, so clocks of machines need not agree. When Redis does not answer, that is logged and this
process goes on with its own count, which it keeps at all times, and asks Redis again after half a minute.
"""

import hashlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable

import redis
import structlog

from shared.settings import RedisSettings

RATE, RATE_WITH_KEY = 3, 10  # requests a second that NCBI allows
WINDOW_S = 1.1  # a request arrives later than it is sent, and not always by the same: the tenth is for the difference
LEAST_WAIT_S = 0.001
UNSENT_WAIT_S = 0.01  # when all that may go is on its way: nobody knows when the first of it will have been sent
REDIS_AGAIN_S = 30.0

# KEYS: times of the requests, mark of a hold. ARGV: rate, window in µs, name of this request, hold in ms or 0, and 1
# when the request was counted before and has been sent now. Returns the wait in µs; 0 when the request is counted.
SCRIPT = """
local held, hold = redis.call('PTTL', KEYS[2]), tonumber(ARGV[4])
if hold > 0 and hold > held then
  redis.call('SET', KEYS[2], 1, 'PX', hold)
  held = hold
end
if held > 0 and ARGV[5] ~= '1' then return held * 1000 end
local clock, window = redis.call('TIME'), tonumber(ARGV[2])
local now = clock[1] * 1000000 + clock[2]
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - window)
if ARGV[5] == '1' or redis.call('ZCARD', KEYS[1]) < tonumber(ARGV[1]) then
  redis.call('ZADD', KEYS[1], now, ARGV[3])
  redis.call('PEXPIRE', KEYS[1], math.ceil(window / 1000) + 1000)
  return 0
end
return redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2] + window - now
"""


class Pace:
    """The count of one process, and of all that share `shared` under the same `name`. Thread-safe."""

    def __init__(
        self,
        rate: int,
        *,
        shared: redis.Redis | None = None,
        name: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rate = rate
        self._shared = shared
        self._keys = [f"drzero:entrez:{{{name}}}:{key}" for key in ("sent", "held")]
        self._shared_from = -math.inf
        self._clock = clock
        self._lock = threading.Lock()
        self._going: set[str] = set()  # counted, but not yet sent
        self._sent: deque[float] = deque()
        self._held_until = -math.inf

    def take(self, request: str) -> float:
        """Seconds to wait before asking again, or 0: the request of this name may go now and is counted."""
        with self._lock:
            wait = self._own_wait() or self._shared_wait(request)
            if not wait:
                self._going.add(request)
            return wait

    def sent(self, request: str) -> None:
        """The request has been written, or has failed before that; a second call for one request does nothing."""
        with self._lock:
            if request in self._going:
                self._going.remove(request)
                self._sent.append(self._clock())
                self._shared_wait(request, sent=True)

    def hold(self, seconds: float) -> None:
        """Let nobody send for so long; a longer hold stands."""
        with self._lock:
            self._held_until = max(self._held_until, self._clock() + seconds)
            self._shared_wait("", hold_s=seconds)

    def _own_wait(self) -> float:
        now = self._clock()
        if self._held_until > now:
            return max(self._held_until - now, LEAST_WAIT_S)
        while self._sent and self._sent[0] + WINDOW_S <= now:
            self._sent.popleft()
        if len(self._going) + len(self._sent) < self.rate:
            return 0.0
        return max(self._sent[0] + WINDOW_S - now, LEAST_WAIT_S) if self._sent else UNSENT_WAIT_S

    def _shared_wait(self, request: str, *, hold_s: float = 0.0, sent: bool = False) -> float:
        if self._shared is None or self._clock() < self._shared_from:
            return 0.0
        arguments = [self.rate, int(WINDOW_S * 1e6), request, math.ceil(hold_s * 1000), int(sent)]
        try:
            wait = int(self._shared.eval(SCRIPT, 2, *self._keys, *arguments))  # type: ignore[arg-type]  # the stubs also cover the async client
        except redis.RedisError as error:
            self._shared_from = self._clock() + REDIS_AGAIN_S
            structlog.get_logger().warning(
                "redis does not answer; requests to NCBI are counted in this process only",
                error=str(error),
                again_s=REDIS_AGAIN_S,
            )
            return 0.0
        return max(wait / 1e6, LEAST_WAIT_S) if wait > 0 else 0.0


def make_pace(settings: RedisSettings, *, rate: int, contact: str, key: str | None) -> Pace:
    """The pace of a caller; rate 0 is what NCBI allows it. Callers with one key, or without with one contact, share."""
    rate = rate or (RATE_WITH_KEY if key else RATE)
    if settings.url is None:
        return Pace(rate)
    limit = settings.timeout_s
    shared = redis.Redis.from_url(settings.url, socket_timeout=limit, socket_connect_timeout=limit, retry=None)
    return Pace(rate, shared=shared, name=hashlib.sha256((key or contact).encode()).hexdigest()[:16])
