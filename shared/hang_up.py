"""Work for a client that may go away: it ends when the client hangs up, and frees what it held."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]  # of ASGI
Result = TypeVar("Result")


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result | None:
    """What `work` gives; when the client of a request whose body is read hangs up before, it is cancelled: None."""
    result, gone = asyncio.ensure_future(work), asyncio.ensure_future(hang_up(receive))
    try:
        await asyncio.wait((result, gone), return_when=asyncio.FIRST_COMPLETED)
        return result.result() if result.done() else None
    finally:
        result.cancel()
        gone.cancel()
        await asyncio.gather(result, gone, return_exceptions=True)


async def hang_up(receive: Receive) -> None:
    """Wait until the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
