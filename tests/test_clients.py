"""Clients of the services against a real server with faults: few errors, retries only where they can help."""

import asyncio
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.clients import (
    BadReply,
    Overdue,
    Refused,
    SearchClient,
    ServiceClient,
    SolverClient,
    Unavailable,
    retry_after_s,
)
from shared.records import Completion

DOCUMENT = {
    "pmid": "1",
    "title": "T",
    "abstract": "A",
    "authors": ["Doe J"],
    "journal": "J",
    "pub_date": "2020",
    "mesh_terms": [],
    "doi": "",
}
HITS = {"results": [{"hits": [{"document": DOCUMENT, "score": 0.5}]}]}
CHAT = {
    "choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}


@dataclass
class Reply:
    """One scripted reply; `close` hangs up without one, `trickle_s` is the time from byte to byte."""

    status: int = 200
    body: object = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    close: bool = False
    trickle_s: float = 0.0


class Server(ThreadingHTTPServer):
    """Answers with its replies in order, the last one for ever; keeps when and what it was asked."""

    daemon_threads = True

    def __init__(self, *replies: Reply, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.replies = list(replies)
        self.asked: list[tuple[float, str, Any]] = []
        self.stopping = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error here."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def waits(self) -> list[float]:
        """Seconds between one request and the next."""
        times = [moment for moment, _, _ in self.asked]
        return [later - earlier for earlier, later in itertools.pairwise(times)]


class Handler(BaseHTTPRequestHandler):
    """Plays the server's script."""

    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.server.asked.append((time.monotonic(), self.path, json.loads(body) if body else None))
        replies = self.server.replies
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if reply.close:
            self.close_connection = True
            return
        raw = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(raw)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if not reply.trickle_s:
            self.wfile.write(raw)
            return
        for byte in raw:
            if self.server.stopping.wait(reply.trickle_s):
                return
            self.wfile.write(bytes([byte]))

    do_GET = do_POST  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@contextmanager
def serving(*replies: Reply) -> Iterator[Server]:
    server = Server(*replies)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()


def call(url: str, *, patience_s: float = 5.0, timeout_s: float = 5.0) -> Any:
    async def work() -> Any:
        async with ServiceClient("part", url, patience_s=patience_s, timeout_s=timeout_s) as client:
            return await client.call("POST", "/do", {"a": 1})

    return asyncio.run(work())


def search(url: str, queries: list[str]) -> Any:
    async def work() -> Any:
        async with SearchClient(url, patience_s=5.0) as client:
            return await client.search(queries, 1)

    return asyncio.run(work())


def chat(url: str) -> Completion:
    async def work() -> Completion:
        async with SolverClient(url, patience_s=5.0) as client:
            return await client.chat({"messages": []})

    return asyncio.run(work())


def test_a_good_reply_comes_back_as_it_is_and_the_request_arrives_as_it_was() -> None:
    with serving(Reply(body={"x": [1, "ü"]})) as server:
        assert call(f"{server.url}/") == {"x": [1, "ü"]}
    assert [(path, body) for _, path, body in server.asked] == [("/do", {"a": 1})]


def test_a_refused_connection_is_unavailable_once_the_patience_is_used_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        call(f"http://127.0.0.1:{port}", patience_s=0.6)
    assert 0.1 <= time.monotonic() - started < 5.0
    assert caught.value.service == "part"
    assert str(caught.value).startswith(f"part: http://127.0.0.1:{port}/do gave no answer within 1 s (ConnectError")


@pytest.mark.parametrize("status", [429, 503])
def test_a_passing_fault_is_retried_until_the_answer_comes(status: int) -> None:
    with serving(Reply(status, {"detail": "busy"}), Reply(body={"ok": 1})) as server:
        assert call(server.url) == {"ok": 1}
    assert len(server.asked) == 2


def test_a_connection_that_drops_is_retried() -> None:
    with serving(Reply(close=True), Reply(body={"ok": 1})) as server:
        assert call(server.url) == {"ok": 1}


@pytest.mark.parametrize("status", [500, 501, 502, 504])
def test_a_defect_of_the_service_is_unavailable_without_a_second_attempt(status: int) -> None:
    with (
        serving(Reply(status, {"detail": "defect"}), Reply(body={"ok": 1})) as server,
        pytest.raises(Unavailable, match=f"{status}.*defect"),
    ):
        call(server.url)
    assert len(server.asked) == 1


def test_half_a_body_is_retried() -> None:
    with serving(Reply(body=b'{"ok"', headers={"Content-Length": "9"}), Reply(body={"ok": 1})) as server:
        assert call(server.url) == {"ok": 1}


def test_a_service_that_comes_up_late_is_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    async def work() -> Any:
        async with ServiceClient("part", f"http://127.0.0.1:{port}", patience_s=20.0) as client:
            asked = asyncio.create_task(client.call("GET", "/do"))
            await asyncio.sleep(0.05)  # the first attempt finds nobody
            server = Server(Reply(body={"ok": 1}), port=port)
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                return await asked
            finally:
                server.shutdown()
                thread.join()
                server.server_close()

    assert asyncio.run(work()) == {"ok": 1}


def test_the_waits_between_attempts_grow() -> None:
    with serving(*[Reply(503)] * 3, Reply(body={})) as server:
        call(server.url, patience_s=10.0)
    assert len(server.waits) == 3
    assert server.waits[2] > server.waits[0]  # 0.5 to 1.5 times 0.25, 0.5, 1 s


def test_the_wait_that_a_busy_service_asks_for_is_kept() -> None:
    with serving(Reply(429, headers={"Retry-After": "1"}), Reply(body={"ok": 1})) as server:
        assert call(server.url) == {"ok": 1}
    assert server.waits[0] >= 1.0


def test_a_wait_longer_than_the_patience_is_not_begun() -> None:
    started = time.monotonic()
    with (
        serving(Reply(503, {"detail": "index loads"}, {"Retry-After": "60"})) as server,
        pytest.raises(Unavailable, match=r"status 503.*index loads"),
    ):
        call(server.url, patience_s=2.0)
    assert time.monotonic() - started < 2.0
    assert len(server.asked) == 1


def test_a_wait_until_a_date_is_kept() -> None:
    until = datetime.now(UTC) + timedelta(seconds=2.5)  # HTTP dates are whole seconds
    with serving(Reply(503, headers={"Retry-After": format_datetime(until, usegmt=True)}), Reply(body={})) as server:
        call(server.url)
    assert server.waits[0] >= 1.0


@given(header=st.text() | st.floats().map(str) | st.dates().map(str))
def test_any_retry_after_is_a_wait_of_zero_seconds_or_more(header: str) -> None:
    assert retry_after_s(header, datetime.now(UTC)) >= 0


@pytest.mark.parametrize("zone", ["GMT", "+0000", ""])
def test_a_date_is_the_time_from_now_until_then_and_a_past_one_none(zone: str) -> None:
    now = datetime(2026, 10, 21, 7, 28, tzinfo=UTC)
    assert retry_after_s(f"Wed, 21 Oct 2026 07:28:30 {zone}", now) == 30
    assert retry_after_s(f"Wed, 21 Oct 2026 07:27:30 {zone}", now) == 0


def test_callers_told_the_same_wait_do_not_come_back_at_the_same_instant() -> None:
    with serving(*[Reply(503, headers={"Retry-After": "1"})] * 8, Reply(body={})) as server:

        async def work() -> None:
            async with ServiceClient("part", server.url, patience_s=20.0) as client:
                await asyncio.gather(*[client.call("POST", "/do", {}) for _ in range(8)])

        asyncio.run(work())
    returns = [moment for moment, _, _ in server.asked[8:]]
    assert max(returns) - min(returns) > 0.02  # 8 draws from 0.25 s


def test_an_answer_that_never_comes_is_overdue() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(Overdue, match="no whole reply"),
    ):  # accepts in its backlog, says nothing
        call(f"http://127.0.0.1:{silent.getsockname()[1]}", patience_s=0.2, timeout_s=0.1)


def test_a_call_lasts_no_longer_than_its_patience_even_if_the_reply_trickles() -> None:
    started = time.monotonic()
    with serving(Reply(body=b" " * 1000, trickle_s=0.05)) as server, pytest.raises(Overdue):
        call(server.url, patience_s=0.4, timeout_s=60.0)
    assert time.monotonic() - started < 5.0


def test_the_patience_of_one_call_overrides_that_of_the_client() -> None:
    async def work(url: str) -> None:
        async with ServiceClient("part", url, patience_s=60.0) as client:
            await client.call("POST", "/do", {}, patience_s=0.3)

    started = time.monotonic()
    with serving(Reply(503)) as server, pytest.raises(Unavailable, match="status 503"):
        asyncio.run(work(server.url))
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize("patience_s", [0.0, -1.0])
def test_without_time_left_a_call_is_overdue(patience_s: float) -> None:
    with serving(Reply(body={})) as server, pytest.raises(Overdue):
        call(server.url, patience_s=patience_s)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_our_own_mistake_is_refused_without_a_second_attempt(status: int) -> None:
    with (
        serving(Reply(status, {"detail": "top_k is 0"})) as server,
        pytest.raises(Refused, match=rf"part: /do {status}: .*top_k is 0"),
    ):
        call(server.url)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=b"<html>hello</html>", headers={"Content-Type": "text/html"}),
        Reply(body=b""),
        Reply(body=b"\xff\xfe{"),
        Reply(body=b"no gzip", headers={"Content-Encoding": "gzip"}),
        Reply(body=b"[" * 100_000),
        Reply(302, {"ok": 1}, {"Location": "/login"}),
    ],
    ids=["html", "empty", "bytes", "not-gzip", "nested", "redirect"],
)
def test_a_body_that_is_no_json_is_a_bad_reply_without_a_second_attempt(reply: Reply) -> None:
    with serving(reply) as server, pytest.raises(BadReply, match="part: "):
        call(server.url)
    assert len(server.asked) == 1


def test_half_a_surrogate_pair_is_sent_as_a_question_mark() -> None:
    with serving(Reply(body=HITS)) as server:
        search(server.url, ["a \ud800 b"])
    assert server.asked[0][2]["queries"] == ["a ? b"]


def test_hits_become_records_in_the_order_of_the_queries() -> None:
    with serving(Reply(body=HITS)) as server:
        [[hit]] = search(server.url, ["q"])
    assert (hit.paper.pmid, hit.paper.authors, hit.score) == ("1", ("Doe J",), 0.5)
    assert server.asked[0][1:] == ("/search", {"queries": ["q"], "top_k": 1})


def test_a_completion_holds_text_and_tokens() -> None:
    with serving(Reply(body=CHAT)) as server:
        assert chat(server.url) == Completion(text="hello", finish_reason="stop", prompt_tokens=3, new_tokens=1)


def test_a_completion_without_content_is_empty_text() -> None:
    empty = {**CHAT, "choices": [{"message": {"content": None}, "finish_reason": "tool_calls"}]}
    with serving(Reply(body=empty)) as server:
        assert chat(server.url).text == ""


def test_too_few_results_are_a_bad_reply() -> None:
    with serving(Reply(body=HITS)) as server, pytest.raises(BadReply, match="1 results for 2 queries"):
        search(server.url, ["q", "r"])


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        None,
        "text",
        {"results": None},
        {"results": [{"hits": [{"document": {**DOCUMENT, "title": None}, "score": 1}]}]},
        {"results": [{"hits": [{"document": {**DOCUMENT, "abstract": "\ud800"}, "score": 1}]}]},
        {"results": [{"hits": [{"document": {}, "score": 1}]}]},
        {"results": [{"hits": [{"document": DOCUMENT, "score": "high"}]}]},
    ],
)
def test_a_search_reply_of_another_shape_is_a_bad_reply(body: object) -> None:
    with serving(Reply(body=body)) as server, pytest.raises(BadReply, match="retrieval: /search lacks"):
        search(server.url, ["q"])


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        {"choices": [], "usage": {}},
        {"choices": [{}], "usage": {}},
        {"choices": 7},
        {**CHAT, "usage": None},
        {**CHAT, "usage": {"prompt_tokens": None, "completion_tokens": 1}},
        {**CHAT, "usage": {"prompt_tokens": float("inf"), "completion_tokens": 1}},
        {**CHAT, "choices": [{"message": {"content": {"a": 1}}, "finish_reason": "stop"}]},
        {**CHAT, "choices": [{"message": {"content": "half \ud800"}, "finish_reason": "stop"}]},
        {**CHAT, "choices": [{"message": {"content": "x"}, "finish_reason": None}]},
    ],
)
def test_a_completion_of_another_shape_is_a_bad_reply(body: object) -> None:
    with serving(Reply(body=body)) as server, pytest.raises(BadReply, match="solver: /v1/chat/completions lacks"):
        chat(server.url)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_variable_does_not_catch_calls_between_our_services(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with serving(Reply(body={"ok": 1})) as server:
        assert call(server.url) == {"ok": 1}
