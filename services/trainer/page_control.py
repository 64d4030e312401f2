"""The run page's POST `/control`: an order of somebody whom the API token has let in, carried out or refused.

The body is a form of at most 2 KiB with `do`, one of control.py's orders. Who may come in at all is settled before
(`shared/access.py`).
"""

import asyncio
from pathlib import Path
from urllib.parse import parse_qs

import structlog
from fastapi import Request

from services.trainer.control import ORDERS, Order, order
from shared.access import NAME
from shared.command import UsageError

LARGEST_BODY = 2048
DONE = 200


async def carry_out(run: Path, request: Request, *, allowed: bool) -> tuple[int, str]:
    """Carry the request's order out for the run in this folder: DONE and the order, or another status and why not."""
    if not allowed:
        return 403, f"the controls are off, because {NAME} is not set where this page is served"
    body = await small_body(request)
    if body is None:
        return 413, f"the request is too large; expected at most {LARGEST_BODY} bytes"
    asked = parse_qs(body).get("do", [""])[-1]
    what: Order | None = next((one for one in ORDERS if one == asked), None)
    if what is None:
        return 422, f"`do` says nothing that can be done; expected one of {', '.join(ORDERS)}"
    try:
        await asyncio.to_thread(order, run, what)
    except UsageError as error:
        return 409, str(error)
    structlog.get_logger().info("control", order=what)
    return DONE, what


async def small_body(request: Request) -> str | None:
    """The body of a request as text, None when it is too large; no more of it is read than that."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            return None
    return body.decode("utf-8", "replace")
