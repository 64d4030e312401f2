"""A server that behaves like the Hugging Face hub as far as an upload and a model's card need it, on a real socket."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 40


@dataclass
class Hub:
    """What has been asked and stored so far, and what is refused."""

    url: str = ""
    cards: dict[str, str] = field(default_factory=dict)  # model → README.md
    refuses: dict[str, tuple[int, str]] = field(default_factory=dict)  # end of a path → status and words
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, authorization
    made: list[dict[str, Any]] = field(default_factory=list)  # repositories
    commits: list[dict[str, bytes]] = field(default_factory=list)  # files of each
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by sha256


class HubHandler(BaseHTTPRequestHandler):
    """Answers for the hub of its server."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        """The hub of the server."""
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def reply(self, status: int, body: bytes = b"{}", **headers: str) -> None:
        """Send a reply; of a HEAD only its head."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        """The request's body, which is noted with the request."""
        path = self.path.partition("?")[0]
        self.hub.asked.append((self.command, path, self.headers.get("authorization", "")))
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def refused(self) -> bool:
        """Whether the request was one that is refused, which is then answered."""
        for end, (status, words) in self.hub.refuses.items():
            if self.path.partition("?")[0].endswith(end):
                self.reply(status, json.dumps({"error": words}).encode(), X_Error_Message=words)
                return True
        return False

    def do_POST(self) -> None:
        """API calls."""
        body = self.body()
        if self.refused():
            return
        if self.path.endswith("/commit/main"):
            self.hub.commits.append(self.committed(body))
            commit = {"commitUrl": f"{self.hub.url}/acme/solver/commit/{COMMIT}", "commitOid": COMMIT}
            self.reply(200, json.dumps(commit).encode())
            return
        asked = json.loads(body)
        if self.path == "/api/repos/create":
            self.hub.made.append(asked)
            found: dict[str, Any] = {"url": f"{self.hub.url}/{asked.get('organization')}/{asked['name']}"}
        elif "/preupload/" in self.path:
            modes = {True: "lfs", False: "regular"}
            files = [{**one, "uploadMode": modes[one["path"].endswith(".safetensors")]} for one in asked["files"]]
            found = {"files": [{**one, "shouldIgnore": False} for one in files]}
        elif self.path.endswith("/info/lfs/objects/batch"):
            found = {"objects": [self.place_of(one) for one in asked["objects"]]}
        else:  # the card's front matter, to be checked
            found = {"errors": [], "warnings": []}
        self.reply(200, json.dumps(found).encode(), Content_Type="application/json")

    def do_PUT(self) -> None:
        """A large file."""
        body = self.body()
        if not self.refused():
            self.hub.stored[self.path.rpartition("/")[2]] = body
            self.reply(200)

    def do_GET(self) -> None:
        """A model's card."""
        self.body()
        card = self.hub.cards.get(self.path.removeprefix("/").partition("/resolve/")[0])
        if card is None or not self.path.endswith("README.md"):
            self.reply(404, X_Error_Code="EntryNotFound")
        else:
            self.reply(200, card.encode(), ETag=f'"{len(card)}"')

    do_HEAD = do_GET  # noqa: N815

    def place_of(self, one: dict[str, Any]) -> dict[str, Any]:
        """Where a large file goes."""
        return {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}

    def committed(self, body: bytes) -> dict[str, bytes]:
        """The files of a commit, by name."""
        files: dict[str, bytes] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        return files

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def hub_of(**changes: Any) -> Iterator[Hub]:
    """A hub on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}", **changes)
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
