"""Windows of a PubMed query: ranges of days small enough that E-utilities give all their papers.

E-utilities give no more than 9,999 papers of any query. `cut` halves the query's publication dates, newer half
first, until every window fits; it only knows a function that counts. A single day with more papers (all that name a
year only stand on its 1st of January) is cut by the day on which the record was created in PubMed; when one such day
is still too large, the query has to be narrowed.

Nothing may vanish between the halves: when they hold fewer papers than the whole, all three are counted again, and when
that does not mend it, `cut` raises BadReply with both numbers. More papers in the halves than in the whole are no
error: PubMed finds a paper at its electronic and at its printed date, which may lie in two windows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial

import structlog

from shared.clients import BadReply
from shared.command import UsageError

CAP = 9_999
OLDEST = date(1700, 1, 1)  # PubMed's oldest papers are of the 1780s
AGREE_TRIES = 12
SERVICE = "PubMed"


@dataclass(frozen=True, slots=True)
class Days:
    """A range of days, both ends included."""

    first: date
    last: date

    def halves(self) -> tuple["Days", "Days"]:
        """The newer and the older half of a range of at least two days."""
        middle = self.first + timedelta(days=(self.last - self.first).days // 2)
        return Days(middle + timedelta(days=1), self.last), Days(self.first, middle)

    def __str__(self) -> str:
        return f"{self.first}..{self.last}"


@dataclass(frozen=True, slots=True)
class Window:
    """Which papers of the query: those published, and those created in PubMed, on these days; None: on any day."""

    published: Days | None = None
    created: Days | None = None

    def __str__(self) -> str:
        parts = [str(self.published or "all")]
        return "_created_".join(parts if self.created is None else [*parts, str(self.created)])


Count = Callable[[Window], int]


def open_days(today: date) -> Days:
    """The days that stand for no date at all: journals date their issues up to a year ahead."""
    return Days(OLDEST, today + timedelta(days=366))


def cut(count: Count, whole: Window, found: int, *, every_day: Days, limit: int) -> dict[Window, int]:
    """Windows of at most `CAP` papers and their counts, newest first, until they hold `limit` papers.

    `found` is the count of `whole`. A query of which no more than `CAP` papers are wanted stays one window.
    """
    if min(found, limit) <= CAP:
        return {whole: found} if found else {}
    windows: dict[Window, int] = {}
    ahead = [(whole, found)]
    while ahead and limit > 0:
        window, papers = ahead.pop()
        if papers > CAP:
            ahead += reversed(_split(count, window, papers, every_day).items())
        elif papers:
            windows[window] = papers
            limit -= papers
    return windows


def agreed(count: Callable[[], int], *known: int) -> int:
    """The first number that two replies, or a reply and a `known` number, agree on; BadReply when they never do."""
    seen = set(known)
    for _ in range(AGREE_TRIES):
        number = count()
        if number in seen:
            return number
        seen.add(number)
    raise BadReply(SERVICE, f"gave {len(seen)} different counts for one search ({sorted(seen)}); run again later")


def _split(count: Count, window: Window, papers: int, every_day: Days) -> dict[Window, int]:
    parts = _parts(window, papers, every_day)
    counts = {parts[0]: count(parts[0])}
    if counts[parts[0]] == papers:  # then the older half holds nothing that the newer one does not
        return counts
    counts |= {part: count(part) for part in parts[1:]}
    if sum(counts.values()) < papers:
        structlog.get_logger().warning(
            "the parts of a window hold fewer papers than the window; they are counted again",
            window=str(window),
            papers=papers,
            in_parts=sum(counts.values()),
        )
        papers = agreed(partial(count, window))
        counts = {part: agreed(partial(count, part)) for part in parts}
    if sum(counts.values()) < papers:
        raise BadReply(
            SERVICE,
            f"finds {papers} papers for {window}, but {sum(counts.values())} in {' and '.join(map(str, parts))}; "
            "run again later, or set DRZERO_INGEST__DATE_FROM and DRZERO_INGEST__DATE_TO",
        )
    return counts


def _parts(window: Window, papers: int, every_day: Days) -> list[Window]:
    published, created = window.published, window.created
    if published is None:
        return [Window(every_day)]
    if published.first < published.last:
        return [Window(half) for half in published.halves()]
    created = created or every_day
    if created.first < created.last:
        return [Window(published, half) for half in created.halves()]
    raise UsageError(
        f"expected at most {CAP} papers published on {published.first} and created in PubMed on {created.first}, "
        f"found {papers}; narrow DRZERO_INGEST__QUERY"
    )
