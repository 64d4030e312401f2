"""What an Entrez run fetches: the PMIDs of the query, and which of them an earlier corpus lacks or has in an old form.

In: who calls, the query, its window, the limit, and what is known already. Out: a `Plan`, kept as one JSON file, so
that a run that was killed goes on with the very papers it began with, whatever PubMed has gained since. Inside
`eutils.configured()` only.
"""

import json
from collections.abc import Container
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path

import structlog

from services.ingest.eutils import SERVICE, Caller
from services.ingest.searches import Found, changed_since, count, search
from services.ingest.windows import CAP, Window, agreed, cut, open_days
from shared.clients import BadReply
from shared.command import UsageError
from shared.files import write_atomically

CLOCKS = timedelta(days=2)  # PubMed's day is that of the US east coast, and its search follows hours later


@dataclass(frozen=True)
class Known:
    """The PMIDs that an earlier corpus of the same filters has met, and the day on which it asked for them."""

    pmids: Container[int] = frozenset()
    asked: date | None = None


@dataclass(frozen=True)
class Plan:
    """The papers of a query, newest first; `fetch` are those that are not known or have changed, in the same order."""

    begun: str  # ISO date
    found: int  # papers of the whole query
    windows: int
    pmids: list[int]
    fetch: list[int]


def made_plan(path: Path, caller: Caller, query: str, *, whole: Window, limit: int, known: Known) -> Plan:
    """The kept plan of an interrupted run, or a new one, which is kept.

    UsageError when the query finds nothing, BadReply when PubMed keeps contradicting itself.
    """
    if path.is_file():
        plan = Plan(**json.loads(path.read_text(encoding="utf-8")))
        structlog.get_logger().info("an interrupted run goes on", found=plan.found, begun=plan.begun)
        return plan
    first = search(caller, query, whole)
    found, windows, pmids = listing(caller, query, whole, first=first, limit=limit)
    if not found:
        raise UsageError(f"PubMed finds no paper for {query!r}{first.remark}; change DRZERO_INGEST__QUERY")
    fetch = [pmid for pmid in pmids if pmid not in known.pmids]
    if known.asked and len(fetch) < len(pmids):
        later = changed_since(query, known.asked - CLOCKS)
        changed = set(listing(caller, later, whole, first=search(caller, later, whole), limit=len(pmids))[2])
        fetch = [pmid for pmid in pmids if pmid not in known.pmids or pmid in changed]
    plan = Plan(_today().isoformat(), found, windows, pmids, fetch)
    write_atomically(path, json.dumps(asdict(plan)) + "\n")
    structlog.get_logger().info(
        "query is answered", found=found, windows=windows, to_fetch=len(fetch), remark=first.remark.strip(" ;()")
    )
    if found > limit:
        structlog.get_logger().warning(
            "the query finds more papers than are fetched; narrow it or its dates, or raise the limit",
            found=found,
            asked=limit,
            left_out=found - limit,
        )
    return plan


def listing(caller: Caller, query: str, whole: Window, *, first: Found, limit: int) -> tuple[int, int, list[int]]:
    """How many papers the query finds, in how many windows, and the first `limit` of their PMIDs."""
    ask = partial(count, caller, query)
    every_day = open_days(_today())
    found = first.count
    if not 0 < found <= CAP:  # too much hangs on this number to believe one reply
        found = agreed(partial(ask, whole), found)
    ahead = list(cut(ask, whole, found, every_day=every_day, limit=limit))
    windows, pmids = 0, dict[int, None]()
    while ahead and len(pmids) < limit:
        window = ahead.pop(0)
        reply = search(caller, query, window, most=min(limit, CAP))
        if reply.count > CAP and limit > CAP:  # it has grown since it was counted, or the count was wrong
            ahead = [*cut(ask, window, reply.count, every_day=every_day, limit=limit), *ahead]
            continue
        windows += 1
        pmids |= dict.fromkeys(reply.pmids)
        found = reply.count if window == whole else found
    if len(pmids) < min(found, limit):
        found = agreed(partial(ask, whole))
        if len(pmids) < min(found, limit):
            raise BadReply(SERVICE, f"finds {found} papers, but {len(pmids)} in all windows together; run again")
    return found, windows, list(pmids)[:limit]


def _today() -> date:
    return datetime.now(UTC).date()
