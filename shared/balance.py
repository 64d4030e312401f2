"""Which of a service's addresses takes the next request, and which are set aside. Makes no request itself.

Of two addresses drawn at random the one with fewer requests in flight is chosen (Mitzenmacher 2001, "The Power of Two
Choices in Randomized Load Balancing"), so that a slow one gets less. An address that failed is set aside: it is chosen
only when no other is left. After 0.5, 1, 2, 4, 8, 16, 30, 30 … s, each times a random 0.5 to 1.5, it is looked at in
the background, and takes part again when it is well. One that asked for a wait (`Retry-After`) is not chosen before
its end. An only address is never set aside: nobody else could be asked.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

import structlog

FIRST_ASIDE_S = 0.5
LONGEST_ASIDE_S = 30.0

LOG: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(slots=True, eq=False)
class Address:
    """One address of a service and how requests have fared there; times are those of time.monotonic()."""

    url: str
    in_flight: int = 0
    aside: bool = False
    failures: int = 0  # in a row; what is in flight together fails together and counts once
    due: float = 0.0  # when it is looked at, once set aside
    closed_until: float = 0.0  # the end of the wait that it asked for

    def fail(self, now: float, after_s: float = 0.0) -> None:
        """Set aside, for `after_s` at least."""
        if not self.aside or now >= self.due:
            self.aside = True
            self.failures += 1
            back_off = min(FIRST_ASIDE_S * 2 ** min(self.failures - 1, 10), LONGEST_ASIDE_S)
            self.due = now + back_off * random.uniform(0.5, 1.5)  # noqa: S311
        self.closed_until = max(self.closed_until, now + after_s)
        self.due = max(self.due, self.closed_until)

    def succeed(self, *, was_aside: bool) -> None:
        """A request has succeeded; `was_aside`: the address was set aside when it was made."""
        # A request of the time before the failure does not say that the address is well again.
        if was_aside or not self.aside:
            self.aside = False
            self.failures = 0


class Balance:
    """The addresses of one service, as one client sees them. Belongs to one event loop."""

    def __init__(self, service: str, urls: Sequence[str], look: Callable[[Address], Awaitable[str]]) -> None:
        """`look` says what is wrong with an address, "" for nothing, and never raises."""
        self.addresses = [Address(url) for url in urls]
        self._service = service
        self._look = look
        self._looks: dict[Address, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """End what goes on in the background."""
        looks = list(self._looks.values())
        for task in looks:
            task.cancel()
        await asyncio.gather(*looks, return_exceptions=True)

    def choose(self, tried: Collection[Address | None]) -> Address | None:
        """The address for a request that the `tried` have failed, or None when no other may be asked now."""
        now = time.monotonic()
        for address in self.addresses:
            if address.aside and now >= address.due:
                self.look_at(address)
        return choose(self.addresses, tried, now)

    def set_aside(self, address: Address, problem: str, *, after_s: float = 0.0) -> None:
        """A request has failed at `address`, which asks for no other within `after_s`."""
        if len(self.addresses) == 1:
            return
        if not address.aside:
            LOG.warning("address set aside", service=self._service, address=address.url, problem=problem)
        address.fail(time.monotonic(), after_s)

    def look_at(self, address: Address) -> None:
        """Find out in the background how an address is, unless that is being done."""
        if len(self.addresses) > 1 and address not in self._looks:
            self._looks[address] = asyncio.create_task(self._find_out(address))

    async def _find_out(self, address: Address) -> None:
        try:
            problem = await self._look(address)
        finally:
            del self._looks[address]
        if problem:
            self.set_aside(address, problem)
        elif address.aside:
            LOG.info("address takes part again", service=self._service, address=address.url)
            address.aside = False  # `failures` stays until a request succeeds: only that shows that it works

    def opens_in_s(self) -> float:
        """Seconds until an address that asked for a wait may be asked again."""
        return max(0.0, min(address.closed_until for address in self.addresses) - time.monotonic())


def addresses_in(text: str) -> list[str]:
    """The addresses of a setting, one or several separated by commas; without doubles, and without a last slash."""
    return list(dict.fromkeys(part.strip().rstrip("/") for part in text.split(",")))


def choose(addresses: Sequence[Address], tried: Collection[Address | None], now: float) -> Address | None:
    """One of `addresses` by the rules above."""
    rest = [address for address in addresses if address not in tried]
    fit = [address for address in rest if not address.aside] or [a for a in rest if now >= a.closed_until]
    if len(fit) < 2:
        return fit[0] if fit else None
    return min(random.sample(fit, 2), key=lambda address: address.in_flight)
