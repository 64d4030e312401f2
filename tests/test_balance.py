"""Several addresses of one service on real sockets: all share the load, and the loss of one costs no request."""

import asyncio
import itertools
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared import balance, clients
from shared.balance import LONGEST_ASIDE_S, Address, addresses_in, choose
from shared.clients import Overdue, Refused, SearchClient, ServiceClient, SolverClient, Unavailable
from shared.settings import SettingsError, build_settings

WELL = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@dataclass(eq=False)
class Site:
    """A server in the loop of the test. `replies` is what each path gets; b"" hangs up, None says nothing."""

    port: int = 0
    replies: dict[str, bytes | None] = field(default_factory=dict)
    delay_s: float = 0.0
    asked: Counter[str] = field(default_factory=Counter)
    _server: asyncio.Server | None = None
    _serving: dict[asyncio.Task[Any], asyncio.StreamWriter] = field(default_factory=dict)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def kill(self) -> None:
        """Gone as after a SIGKILL: requests in flight lose their connections, new ones find nobody."""
        assert self._server is not None
        self._server.close()
        for writer in self._serving.values():
            writer.transport.abort()
        await asyncio.gather(*self._serving)

    async def was_asked(self, times: int, path: str = "/do") -> None:
        """Return when it was asked so often."""
        async with self._news:
            await self._news.wait_for(lambda: self.asked[path] >= times)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving[task] = writer
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            del self._serving[task]
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lengths = [line.split(":")[1] for line in head.split("\r\n") if line.lower().startswith("content-length:")]
        await reader.readexactly(int(lengths[0]) if lengths else 0)
        path = head.split(" ")[1]
        self.asked[path] += 1
        async with self._news:
            self._news.notify_all()
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        reply = self.replies.get(path, WELL)
        if reply is None:
            await reader.read()  # until the client has gone
            return False
        writer.write(reply)
        await writer.drain()
        return bool(reply)


def status(code: int, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {code} Status", "Content-Length: 2", *headers, "", "{}"]).encode()


@asynccontextmanager
async def serving(*sites: Site) -> AsyncIterator[ServiceClient]:
    """A client of all the sites."""
    for site in sites:
        await site.start()
    try:
        async with ServiceClient("part", ",".join(site.url for site in sites), patience_s=10.0) as client:
            yield client
    finally:
        for site in sites:
            await site.kill()


async def ask(client: ServiceClient, times: int, at_once: int = 1) -> None:
    """So many requests, `at_once` of them in flight; raises when one fails."""
    numbers = iter(range(times))

    async def caller() -> None:
        for _ in numbers:
            assert await client.call("POST", "/do", {"a": 1}) == {}

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(caller())


async def until(client: ServiceClient, holds: Callable[[], bool]) -> None:
    """Ask until something holds."""
    give_up = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < give_up
        await ask(client, 1)


def in_loop(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await work()

    asyncio.run(main())


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "FIRST_ASIDE_S", 0.05)


# --- load


def test_every_address_gets_its_share_of_the_load() -> None:
    sites = [Site(delay_s=0.005) for _ in range(3)]

    async def work() -> None:
        async with serving(*sites) as client:
            await ask(client, 300, at_once=24)

    in_loop(work)
    assert sum(site.asked["/do"] for site in sites) == 300
    assert all(60 <= site.asked["/do"] <= 140 for site in sites)


def test_requests_that_come_one_by_one_go_to_all_addresses_too() -> None:
    one, other = Site(), Site()

    async def work() -> None:
        async with serving(one, other) as client:
            await ask(client, 60)

    in_loop(work)
    assert min(one.asked["/do"], other.asked["/do"]) >= 10


def test_a_slow_address_gets_less() -> None:
    slow, fast = Site(delay_s=0.1), Site(delay_s=0.005)

    async def work() -> None:
        async with serving(slow, fast) as client:
            await ask(client, 200, at_once=8)

    in_loop(work)
    assert 0 < slow.asked["/do"] < fast.asked["/do"] / 4


# --- an address that fails


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.parametrize("reply", [b"", status(503), status(500)], ids=["hangs up", "busy", "defect"])
def test_a_failing_address_costs_no_request_gets_none_after_the_first_and_takes_part_again_when_it_is_well(
    reply: bytes,
) -> None:
    bad, good = Site(replies={"/do": reply, "/health": reply}), Site()

    async def work() -> None:
        async with serving(bad, good) as client:
            await until(client, lambda: bad.asked["/do"] == 1)
            await until(client, lambda: bad.asked["/health"] == 2)
            assert bad.asked["/do"] == 1
            bad.replies.clear()
            await until(client, lambda: bad.asked["/do"] == 20)

    in_loop(work)


def test_an_address_that_looks_well_but_fails_is_set_aside_for_longer_each_time() -> None:
    bad, good = Site(replies={"/do": b""}), Site()
    moments: list[float] = []

    async def work() -> None:
        async with serving(bad, good) as client:
            for times in range(1, 4):
                await until(client, lambda times=times: bad.asked["/do"] == times)  # type: ignore[misc]
                moments.append(time.monotonic())

    in_loop(work)
    first, second = (later - earlier for earlier, later in itertools.pairwise(moments))
    assert 0.25 <= first <= 1.5
    assert 0.5 <= second <= 3.0


@pytest.mark.usefixtures("quick_looks")
def test_killing_one_of_two_in_the_middle_loses_no_request_and_once_back_it_takes_part() -> None:
    one, other = Site(delay_s=0.01), Site(delay_s=0.01)

    async def work() -> None:
        async with serving(one, other) as client, asyncio.TaskGroup() as group:
            group.create_task(ask(client, 600, at_once=16))
            await one.was_asked(50)
            await one.kill()
            before = one.asked["/do"]
            await other.was_asked(300)
            assert one.asked["/do"] == before
            await one.start()
            await until(client, lambda: one.asked["/do"] > before + 20)

    in_loop(work)


def test_an_address_that_hangs_is_found_out_by_the_first_calls_whose_patience_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clients, "PROBE_S", 0.1)
    hung, good = Site(replies={"/do": None, "/health": None}), Site()

    async def work() -> None:
        async with serving(hung, good) as client:
            lost: list[int] = []
            for number in range(200):
                try:
                    await client.call("POST", "/do", {}, patience_s=0.1)
                except Overdue:
                    lost.append(number)
            assert 0 < len(lost) == hung.asked["/do"] <= 5  # the look takes as long as one such call

    in_loop(work)


def test_a_call_with_little_patience_does_not_set_a_slow_address_aside() -> None:
    slow, other = Site(delay_s=0.2), Site(delay_s=0.2)

    async def work() -> None:
        async with serving(slow, other) as client:
            for _ in range(4):
                with pytest.raises(Overdue):
                    await client.call("POST", "/do", {}, patience_s=0.05)
            slow.delay_s = other.delay_s = 0.0
            before = Counter(slow.asked), Counter(other.asked)
            await ask(client, 60)
            assert min(slow.asked["/do"] - before[0]["/do"], other.asked["/do"] - before[1]["/do"]) >= 10

    in_loop(work)


def test_a_request_that_is_refused_sets_nothing_aside() -> None:
    sites = [Site(replies={"/wrong": status(422)}) for _ in range(2)]

    async def work() -> None:
        async with serving(*sites) as client:
            for _ in range(20):
                with pytest.raises(Refused, match="part: /wrong 422"):
                    await client.call("POST", "/wrong", {})
            await ask(client, 60)

    in_loop(work)
    assert sum(site.asked["/wrong"] for site in sites) == 20  # each asked once
    assert min(site.asked["/do"] for site in sites) >= 10


def test_the_wait_an_address_asks_for_is_kept_while_the_other_works() -> None:
    busy, good = Site(replies={"/do": status(503, "Retry-After: 1")}), Site()

    async def work() -> None:
        async with serving(busy, good) as client:
            await until(client, lambda: busy.asked["/do"] == 1)
            told, busy.replies = time.monotonic(), {}
            await until(client, lambda: busy.asked["/do"] == 2)
            assert time.monotonic() - told >= 0.9

    in_loop(work)


# --- all addresses fail


def test_when_all_are_dead_the_error_names_all_once_the_patience_is_used_up() -> None:
    urls = [f"http://127.0.0.1:{unused_port()}" for _ in range(2)]

    async def work() -> None:
        async with ServiceClient("part", ", ".join(urls), patience_s=0.8) as client:
            await client.call("POST", "/do", {})

    started = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        in_loop(work)
    assert 0.1 <= time.monotonic() - started < 5.0
    assert str(caught.value).startswith(f"part: {urls[0]}/do, {urls[1]}/do gave no answer within 1 s (")
    assert all(f"{url}: ConnectError" in str(caught.value) for url in urls)


def test_when_all_are_dead_the_first_that_comes_up_answers() -> None:
    one, other = Site(), Site()

    async def work() -> None:
        async with serving(one, other) as client:
            await one.kill()
            await other.kill()
            late = asyncio.create_task(ask(client, 40, at_once=8))
            await asyncio.sleep(0.05)  # the first tries find nobody
            await other.start()
            await late

    in_loop(work)
    assert other.asked["/do"] == 40


def test_when_all_ask_for_a_wait_a_call_waits_for_the_shortest() -> None:
    soon, late = (Site(replies={"/do": status(503, f"Retry-After: {wait_s}")}) for wait_s in (1, 60))

    async def work() -> None:
        async with serving(soon, late) as client:
            started = time.monotonic()
            with pytest.raises(Unavailable, match="status 503"):
                await client.call("POST", "/do", {}, patience_s=0.5)
            assert (soon.asked["/do"], late.asked["/do"]) == (1, 1)
            soon.replies.clear()
            await ask(client, 8, at_once=8)
            assert 1.0 <= time.monotonic() - started < 5.0
            soon.replies["/do"] = status(503, "Retry-After: 60")
            for told in ("status 503", "each asked for a longer wait"):
                with pytest.raises(Unavailable, match=told):
                    await client.call("POST", "/do", {})
            assert (soon.asked["/do"], late.asked["/do"]) == (10, 1)

    in_loop(work)


def test_a_request_that_is_a_defect_everywhere_is_asked_once_at_each_and_does_not_stop_the_others() -> None:
    sites = [Site(replies={"/poison": status(500)}) for _ in range(3)]

    async def work() -> None:
        async with serving(*sites) as client:
            started = time.monotonic()
            with pytest.raises(Unavailable, match=r"/poison 500") as caught:
                await client.call("POST", "/poison", {})
            await ask(client, 30, at_once=3)
            assert time.monotonic() - started < 2.0
            assert all(site.url in str(caught.value) for site in sites)

    in_loop(work)
    assert [site.asked["/poison"] for site in sites] == [1, 1, 1]


# --- clients and settings


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.parametrize(("kind", "path"), [(SearchClient, "/ready"), (SolverClient, "/health")])
def test_a_client_looks_where_its_service_says_that_it_takes_requests(kind: Any, path: str) -> None:
    bad, good = Site(replies={"/do": b""}), Site()

    async def work() -> None:
        async with serving(bad, good), kind(f"{bad.url},{good.url}", patience_s=9) as client:
            await until(client, lambda: bad.asked[path] > 0)

    in_loop(work)


def test_closing_ends_what_goes_on_in_the_background() -> None:
    hung, good = Site(replies={"/do": b"", "/health": None}), Site()

    async def work() -> None:
        async with serving(hung, good) as client:
            await until(client, lambda: hung.asked["/health"] == 1)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    in_loop(work)


def test_an_address_setting_is_one_address_or_several_separated_by_commas() -> None:
    text = "http://a:1, https://b:2/solver/,http://a:1/"
    settings = build_settings({"DRZERO_SOLVER__URL": text, "DRZERO_RETRIEVAL__URL": "http://c"})
    assert addresses_in(settings.solver.url) == ["http://a:1", "https://b:2/solver"]
    assert addresses_in(settings.retrieval.url) == ["http://c"]


@pytest.mark.parametrize("text", ["http://a,", ",http://a", "http://a b", "http://a,b:2", "http://a;http://b c"])
def test_a_list_with_something_else_than_addresses_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="DRZERO_RETRIEVAL__URL"):
        build_settings({"DRZERO_RETRIEVAL__URL": text})


# --- the rules alone

addresses = st.lists(
    st.builds(
        Address,
        st.just("http://a"),
        in_flight=st.integers(0, 5),
        aside=st.booleans(),
        closed_until=st.sampled_from([0.0, 20.0]),
    ),
    min_size=1,
    max_size=5,
)


@given(addresses, st.data())
def test_the_chosen_address_is_untried_and_set_aside_or_closed_only_when_no_better_one_is_left(
    several: list[Address], data: st.DataObject
) -> None:
    tried = data.draw(st.lists(st.sampled_from(several)))
    rest = [address for address in several if address not in tried]
    chosen = choose(several, tried, 10.0)
    if chosen is None:
        assert all(address.aside and address.closed_until > 10 for address in rest)
    else:
        assert chosen in rest
        assert not chosen.aside or (all(address.aside for address in rest) and chosen.closed_until <= 10)


@given(addresses)
def test_the_busiest_of_all_addresses_is_never_chosen(several: list[Address]) -> None:
    well = [address for address in several if not address.aside]
    chosen = choose(several, (), 10.0)
    if chosen is not None and len({address.in_flight for address in well}) > 1:
        assert chosen.in_flight < max(address.in_flight for address in well) or (
            [address.in_flight for address in well].count(chosen.in_flight) > 1
        )


@given(st.integers(1, 30), st.integers(1, 5))
@example(3000, 1)
def test_failures_one_by_one_double_the_time_aside_up_to_a_bound_and_those_at_once_count_as_one(
    times: int, at_once: int
) -> None:
    address, now = Address("http://a"), 0.0
    for number in range(times):
        for _ in range(at_once):
            address.fail(now)
        wanted = min(0.5 * 2.0 ** min(number, 20), LONGEST_ASIDE_S)
        assert 0.5 * wanted <= address.due - now <= 1.5 * wanted + 1e-6
        now = address.due
    assert address.failures == times


def test_only_a_request_made_since_the_failure_ends_it() -> None:
    address = Address("http://a")
    address.fail(1.0)
    address.succeed(was_aside=False)
    assert address.aside
    address.succeed(was_aside=True)
    assert (address.aside, address.failures) == (False, 0)
