"""Fakes of the solver and search services on real sockets, with faults on demand, for tests of the reward."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG_S = 60.0

Reply = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class Fault:
    """A reply as it stands on the wire: after `after_s`, `body` as it is, and of it only a part when `cut`."""

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    after_s: float = 0.0
    cut: bool = False


HANG = Fault(after_s=HANG_S)
GARBAGE = Fault(body=b"<html>\xff no JSON")
WRONG_SHAPE = Fault(body=b'{"choices": [{"message": {"content": 7}}], "results": [{"hits": 1}]}')
HALF_A_BODY = Fault(body=b'{"choices": [], "results": []}', cut=True)
HANGS_UP = Fault(cut=True)
BUSY = Fault(429, b'{"detail": "busy"}', (("Retry-After", "0"),))
LOADING = Fault(503, b'{"detail": "loading"}')
CRASH = Fault(500, b'{"detail": "defect"}')

Answer = Callable[[str, dict[str, Any]], Reply | Fault]


class Service(ThreadingHTTPServer):
    """Answers POSTs by `answer(path, body)`; counts connections and the most requests in flight at once."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, answer: Answer, *, port: int = 0, handler: "type[Handler] | None" = None) -> None:
        super().__init__(("127.0.0.1", port), handler or Handler)
        self.answer = answer
        self.stopping = threading.Event()
        self.connections = 0
        self.requests = 0
        self.peak = 0
        self._in_flight = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def counted(self) -> Iterator[None]:
        """One request, from its last byte to the first of its reply: never more than the client has in flight."""
        with self._lock:
            self.requests += 1
            self._in_flight += 1
            self.peak = max(self.peak, self._in_flight)
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error here."""


class Handler(BaseHTTPRequestHandler):
    """Keeps its connection open, as the real services do."""

    server: Service
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        self.server.connections += 1
        super().setup()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.counted():
            reply = self.server.answer(self.path, body)
            fault = reply if isinstance(reply, Fault) else Fault(reply[0], json.dumps(reply[1]).encode())
            if fault.after_s and self.server.stopping.wait(fault.after_s):
                self.close_connection = True
                return
        self.play(fault)

    def play(self, fault: Fault) -> None:
        """Write the reply, or as much of it as there is."""
        self.close_connection = self.close_connection or fault.cut
        if fault.cut and not fault.body:
            return
        self.send_response(fault.status)
        for name, value in (("Content-Length", str(len(fault.body))), *fault.headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(fault.body[: len(fault.body) // 2] if fault.cut else fault.body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def watched(answer: Answer, *, handler: type[Handler] | None = None) -> Iterator[Service]:
    """A server that answers POSTs by `answer(path, body)`, with its counts."""
    service = Service(answer, handler=handler)
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        service.stopping.set()
        service.shutdown()
        service.server_close()
        thread.join()


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """A server that answers POSTs by `answer(path, body)`; yields its address."""
    with watched(answer) as service:
        yield service.url


def chat_reply(text: str, finish_reason: str = "stop", *, prompt_tokens: int = 1, new_tokens: int = 1) -> Reply:
    """An OpenAI chat reply."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": new_tokens}
    return 200, {"choices": [choice], "usage": usage}


def search_reply(queries: list[str], pmid: str, abstract: str = "AMPK.") -> Reply:
    """A reply of /search with one paper per query."""
    document = {
        "pmid": pmid, "title": "A paper", "abstract": abstract, "authors": [], "journal": "", "pub_date": "",
        "mesh_terms": [], "doi": "",
    }  # fmt: skip
    return 200, {"results": [{"query": q, "hits": [{"score": 0.5, "document": document}]} for q in queries]}


def slowly(reply: Reply, seconds: float) -> Fault:
    """A good reply that comes after `seconds`."""
    return Fault(reply[0], json.dumps(reply[1]).encode(), after_s=seconds)
