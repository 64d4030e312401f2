"""The one API token: who may search, ask a model, change weights or steer a run where a port is open to others.

From `DRZERO_API_TOKEN`, or the file that `DRZERO_API_TOKEN_FILE` names (a Compose secret). It is a secret, no setting:
no manifest, log or list of settings can hold it. Without one everybody who reaches a port is let in, which is right on
a loopback address only. With one, every request needs it but the GETs of `OPEN`, which cost nothing: as
`Authorization: Bearer <token>`, or as the password of HTTP Basic, for which a browser asks by itself. Comparing takes
the same time whatever is wrong.

A browser's request that another site has made is refused with and without a token, unless a person followed a link.
"""

import base64
import binascii
import hmac
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic_core import to_json

from shared.settings import SettingsError

if TYPE_CHECKING:  # ingest sends no token to anybody, and has no web framework
    from starlette.types import ASGIApp, Receive, Scope, Send

NAME = "DRZERO_API_TOKEN"  # one of SECRETS in settings.py
SHORTEST = 16  # characters
OPEN = frozenset({"/health", "/ready", "/metrics"})
HARMLESS = frozenset({"GET", "HEAD", "OPTIONS"})
OURS = frozenset({b"same-origin", b"none"})  # of Sec-Fetch-Site, which every browser of today sends
LOOPBACK = ("127.", "localhost", "::1")


class Hidden(str):
    """A secret that no representation shows, also not that of an object that holds it; it stays so when pickled."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'…'"


def api_token(environ: Mapping[str, str] = os.environ) -> Hidden | None:
    """The token, or None where none is set; SettingsError for one that cannot be used."""
    token, file = environ.get(NAME, "").strip(), environ.get(f"{NAME}_FILE", "")
    if not token and file:
        if not Path(file).is_file():
            raise SettingsError(f"{NAME}_FILE names {file}, but there is no such file")
        token = Path(file).read_text(encoding="utf-8").strip()
    if not token:
        return None
    if len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        raise SettingsError(
            f"expected {NAME} to be at least {SHORTEST} printable ASCII characters without spaces, found "
            f"{len(token)} characters; make one: openssl rand -hex 32"
        )
    return Hidden(token)


def token_headers(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What our own clients send with every request."""
    token = api_token(environ)
    return {"Authorization": f"Bearer {token}"} if token else {}


def exposed(host: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a service that listens on `host` lets everybody in who reaches this machine."""
    return api_token(environ) is None and not host.startswith(LOOPBACK)


class Access:
    """ASGI middleware that lets in who has the token."""

    def __init__(self, app: "ASGIApp", token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if headers.get(b"sec-fetch-site", b"none") not in OURS and not follows_link(scope["method"], headers):
            await refuse(scope, send, 403, "a page of another site may not ask for this")
        elif self._open(scope) or self._known(headers.get(b"authorization", b"")):
            await self._app(scope, receive, send)
        else:
            asked = [(b"www-authenticate", b'Basic realm="Dr. Zero: any name, the API token as password"')]
            text = f"this needs the API token: send the header 'Authorization: Bearer <token>' ({NAME})"
            await refuse(scope, send, 401, text, asked)

    def _open(self, scope: "Scope") -> bool:
        return self._token is None or (scope["path"] in OPEN and scope["method"] in HARMLESS)

    def _known(self, given: bytes) -> bool:
        return self._token is not None and hmac.compare_digest(presented(given), self._token.encode())


def follows_link(method: str, headers: Mapping[bytes, bytes]) -> bool:
    """Whether a person has followed a link to us."""
    return method in HARMLESS and headers.get(b"sec-fetch-mode") == b"navigate"


def presented(authorization: bytes) -> bytes:
    """The token in an Authorization header; b"" for a header without one."""
    kind, _, value = authorization.partition(b" ")
    if kind.lower() == b"bearer":
        return value.strip()
    if kind.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


async def refuse(
    scope: "Scope", send: "Send", status: int, detail: str, more: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Answer instead of the app, with the error body that all services share."""
    body = to_json({"detail": detail, "request_id": scope.get("state", {}).get("request_id", "")})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
