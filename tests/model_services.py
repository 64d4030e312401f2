"""Fakes of the solver and search services on real sockets, for tests of the reward."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, Any]]


@contextmanager
def serving(answer: Callable[[str, dict[str, Any]], Reply]) -> Iterator[str]:
    """A server that answers POSTs by `answer(path, body)`; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, reply = answer(self.path, body)
            text = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def chat_reply(text: str, finish_reason: str = "stop") -> Reply:
    """An OpenAI chat reply."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}


def search_reply(queries: list[str], pmid: str) -> Reply:
    """A reply of /search with one paper per query."""
    document = {
        "pmid": pmid, "title": "A paper", "abstract": "AMPK.", "authors": [], "journal": "", "pub_date": "",
        "mesh_terms": [], "doi": "",
    }  # fmt: skip
    return 200, {"results": [{"query": q, "hits": [{"score": 0.5, "document": document}]} for q in queries]}
