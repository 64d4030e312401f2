"""The pace of calls to NCBI: never above the limit, not far below it, holds, a Redis that is shared or goes away."""

import itertools
import shutil
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from eutils_server import most_in_a_second
from hypothesis import given
from hypothesis import strategies as st
from redis.backoff import NoBackoff
from redis.retry import Retry

from services.ingest.pace import REDIS_AGAIN_S, Pace, make_pace
from shared.settings import RedisSettings

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server on the path")


class FakeClock:
    """A clock that only sleep moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


NAMES = itertools.count()


def took(pace: Pace) -> float:
    """The wait of a request that is sent at once when it may go."""
    request = f"request {next(NAMES)}"
    wait = pace.take(request)
    pace.sent(request)
    return wait


def send(pace: Pace, clock: FakeClock, delay: float = 0.0) -> float:
    """Wait for the turn of one request, which needs `delay` seconds until it is written; the time of that."""
    request = f"request {next(NAMES)}"
    while wait := pace.take(request):
        clock.sleep(wait)
    clock.sleep(delay)
    pace.sent(request)
    return clock.now


@given(st.integers(1, 10), st.lists(st.tuples(st.floats(0, 3), st.floats(0, 3)), min_size=1, max_size=80))
def test_no_second_holds_more_requests_than_the_rate_however_late_they_are_asked_for_or_written(
    rate: int, gaps: list[tuple[float, float]]
) -> None:
    clock = FakeClock()
    pace, times = Pace(rate, clock=clock), []
    for gap, delay in gaps:
        clock.sleep(gap)
        times.append(send(pace, clock, delay))
    assert most_in_a_second(times) <= rate


def test_a_request_on_its_way_counts_until_it_is_written_and_a_second_longer() -> None:
    clock = FakeClock()
    pace = Pace(1, clock=clock)
    assert pace.take("slow") == 0
    clock.sleep(5)
    assert pace.take("next") > 0
    pace.sent("slow")
    pace.sent("slow")
    clock.sleep(1)
    assert pace.take("next") > 0
    clock.sleep(0.2)
    assert pace.take("next") == 0


@pytest.mark.parametrize("rate", [3, 10])
def test_many_requests_take_no_more_than_a_fifth_longer_than_the_limit_asks(rate: int) -> None:
    clock = FakeClock()
    pace = Pace(rate, clock=clock)
    times = [send(pace, clock) for _ in range(300)]
    assert (times[-1] - times[0]) / (300 / rate) <= 1.2


def test_threads_share_one_count() -> None:
    pace = Pace(50)
    given_at_once = [0.0] * 8

    def ask(number: int) -> None:
        given_at_once[number] = sum(took(pace) == 0 for _ in range(20))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(given_at_once) == 50


def test_a_hold_stops_everybody_and_a_shorter_one_does_not_end_it() -> None:
    clock = FakeClock()
    pace = Pace(3, clock=clock)
    pace.hold(7)
    pace.hold(2)
    assert took(pace) == pytest.approx(7)
    clock.sleep(6.9)
    assert took(pace) > 0
    clock.sleep(0.2)
    assert took(pace) == 0


def test_the_rate_is_ncbis_own_unless_one_is_set() -> None:
    rates = [
        make_pace(RedisSettings(), rate=rate, contact="a@b.org", key=key).rate
        for rate, key in [(0, None), (0, "k"), (7, "k")]
    ]
    assert rates == [3, 10, 7]


class _Counter(socketserver.StreamRequestHandler):
    """As much of Redis as one script needs: it says 0 as often as `left` allows, then hangs up."""

    left = 4

    def handle(self) -> None:
        while line := self.rfile.readline():
            words = []
            for _ in range(int(line[1:])):
                size = int(self.rfile.readline()[1:])
                words.append(self.rfile.read(size + 2)[:-2].upper())
            if words[0] == b"HELLO":
                self.wfile.write(b"%1\r\n$5\r\nproto\r\n:3\r\n")
            elif words[0] == b"EVAL":
                if not _Counter.left:
                    return
                _Counter.left -= 1
                self.wfile.write(b":0\r\n")
            else:
                self.wfile.write(b"+OK\r\n")


def test_redis_that_goes_away_is_told_once_and_the_count_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    clock = FakeClock()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Counter) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        with redis.Redis(port=server.server_address[1], retry=Retry(NoBackoff(), 0), socket_timeout=1) as shared:
            pace = Pace(3, shared=shared, name="x", clock=clock)
            assert [took(pace) for _ in range(3)] == [0, 0, 0]  # the third without Redis
            assert took(pace) > 0
            clock.sleep(REDIS_AGAIN_S / 2)
            assert [took(pace) for _ in range(3)] == [0, 0, 0]
        server.shutdown()
        thread.join()
    assert _Counter.left == 0
    assert capsys.readouterr().out.count("redis does not answer") == 1


def test_redis_that_was_never_there_does_not_stop_anything() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"redis://127.0.0.1:{held.getsockname()[1]}/0"
    pace = make_pace(RedisSettings(url=address), rate=3, contact="a@b.org", key=None)
    assert took(pace) == 0


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert any("eady to accept connections" in line for line in process.stdout)
        yield f"unix://{path}"
        process.terminate()


@needs_redis
def test_two_machines_with_one_redis_stay_below_the_limit_together(redis_url: str) -> None:
    settings = RedisSettings(url=redis_url)
    one, two = (make_pace(settings, rate=5, contact="a@b.org", key=None) for _ in range(2))
    other = make_pace(settings, rate=5, contact="c@d.org", key=None)
    assert [took(pace) == 0 for pace in (one, two, one, two, one)] == [True] * 5
    assert 0 < took(one) <= 1.1
    assert 0 < took(two) <= 1.1
    assert took(other) == 0
    other.hold(30)
    assert 29 < took(make_pace(settings, rate=5, contact="c@d.org", key=None)) <= 30
