"""A PubMed query of any size to papers, through ESearch and EFetch in batches.

In: query, publication dates and contact of the settings; a key, if any, from `NCBI_API_KEY` or the file that
`NCBI_API_KEY_FILE` names. Out: papers, newest first, with the counts found, windows, asked, fetched and missing. At
most `max_records` are fetched: of 9,999 or fewer the first of PubMed's own order, of more the newest by publication
date; what is left out is counted and logged.

Every batch is kept under `<scratch_dir>/ingest/<query>` until `done()`, so that a run that was killed goes on where it
was, and the corpus is made from the kept batches in their order: it depends neither on the number of workers nor on
faults or interruptions. A corpus of the same query, dates and limit is reused, because PubMed grows daily: `--update`
asks what is new. What an earlier corpus of the same filters has, of whatever query, is not fetched again unless PubMed
has changed it since.
"""

import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from services.ingest.batches import Fetched, Job, fetched
from services.ingest.estimate import Estimate, of_query
from services.ingest.eutils import Caller, configured
from services.ingest.filters import FATES, Rules, fate
from services.ingest.pace import make_pace
from services.ingest.plan import Known, made_plan
from services.ingest.searches import count
from services.ingest.store import Base, Change
from services.ingest.windows import CAP, Days, Window, open_days
from shared.command import UsageError
from shared.corpus import Shards
from shared.files import hash_json
from shared.ledger import NO_ROW
from shared.progress import Progress
from shared.settings import IngestSettings, Settings

PLAN = "plan.json"
ADDRESS = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s.]+")


class EntrezQuery:
    """The `entrez` source. UsageError when query, dates, contact or key file do not do."""

    may_differ = frozenset({"max_records"})

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        ingest = settings.ingest
        self.query = checked_query(ingest)
        self.whole = whole_window(ingest, datetime.now(UTC).date())
        self.made_from: Mapping[str, str] = {
            "entrez_url": ingest.entrez_url,
            "query": self.query,
            "dates": f"{ingest.date_from or ''}..{ingest.date_to or ''}",
        }
        self.shaped_by: Mapping[str, Any] = {"max_records": ingest.max_records}
        ended = threading.Event()
        identity = hash_json([self.made_from, ingest.max_records, ingest.entrez_batch, CAP])
        self.job = Job(
            caller=make_caller(settings, ended),
            batch=ingest.entrez_batch,
            workers=ingest.entrez_workers,
            folder=settings.storage.scratch_dir / "ingest" / identity[:16],
            ended=ended,
        )

    def done(self) -> None:
        """Remove the kept batches: the corpus is published."""
        if self.job.folder.exists():
            shutil.rmtree(self.job.folder)

    def estimate(self, base: Base) -> Estimate:
        """What a run from nothing will take, which is the most; asks PubMed for the number of papers only."""
        ingest, caller = self.settings.ingest, self.job.caller
        with configured(caller):
            found = count(caller, self.query, self.whole)
        return of_query(found, limit=ingest.max_records, batch=self.job.batch, cap=CAP, rate=caller.pace.rate)

    def goes_on_from(self, base: Base) -> bool:
        """Whether the base's papers came from the same service."""
        return bool(base.origin["entrez_url"] == self.made_from["entrez_url"])

    def change(self, base: Base, draft: Path) -> Change:
        """The papers that the base lacks or has in another form, and which of its entries the query still finds."""
        known = Known(base.ledger, date.fromisoformat(base.origin["asked"])) if base.origin else Known()
        limit = self.settings.ingest.max_records
        job = replace(self.job, folder=self.job.folder / base.identity[:16])  # what is fetched depends on the base
        with configured(job.caller):
            plan = made_plan(job.folder / PLAN, job.caller, self.query, whole=self.whole, limit=limit, known=known)
            with Progress("ingest", self.settings, total=len(plan.fetch)) as progress:
                came = fetched(job, plan.fetch, progress.advance)
        same = unchanged(came, base, Rules.of(self.settings.ingest))
        pmids = np.array([pmid for pmid in plan.fetch if pmid in came.versions and pmid not in same], np.int64)
        wanted = np.isin(base.ledger.pmids, np.array(plan.pmids, np.int64))
        remains = wanted & ~np.isin(base.ledger.pmids, pmids)
        carried, asked = int(remains.sum()), len(plan.pmids)
        counts = Counter(
            found=plan.found, windows=plan.windows, asked=asked, carried=carried, fetched=len(pmids),
            missing=asked - carried - len(pmids), read=carried + len(pmids),
        )  # fmt: skip
        if counts["missing"]:
            structlog.get_logger().warning("NCBI sent fewer papers than it found", **counts)
        versions = np.array([min(came.versions[pmid], 255) for pmid in pmids.tolist()], np.uint8)
        origin = {"entrez_url": self.made_from["entrez_url"], "asked": plan.begun}
        papers = (paper for paper in came.papers() if int(paper.pmid) not in same)
        return Change(remains, pmids, versions, papers, counts, origin)


def unchanged(came: Fetched, base: Base, rules: Rules) -> set[int]:
    """The PMIDs of papers that came as the base has them, or that are left out for the same reason as before.

    PubMed's day of change says nothing of what has changed, which mostly is no field of a paper.
    """
    again = {pmid: place for pmid in came.versions if (place := base.ledger.place(pmid)) is not None}
    if base.folder is None or not again:
        return set()
    ledger, shards = base.ledger, Shards(base.folder)
    same = set[int]()
    for paper in came.papers():
        place = again.get(int(paper.pmid))
        if place is None or FATES.index(fate(paper, rules)) != ledger.fates[place]:
            continue
        if ledger.rows[place] == NO_ROW or shards[int(ledger.rows[place])] == paper:
            same.add(int(paper.pmid))
    return same


def make_caller(settings: Settings, ended: threading.Event) -> Caller:
    """The caller of these settings and of the environment's key; its waits end when the run has `ended`."""
    ingest = settings.ingest
    contact, key = checked_contact(ingest.email), read_key(os.environ)
    return Caller(
        base_url=ingest.entrez_url,
        contact=contact,
        key=key,
        timeout_s=ingest.entrez_timeout_s,
        tries=ingest.entrez_tries,
        pace=make_pace(settings.redis, rate=ingest.entrez_rate, contact=contact, key=key),
        retries=threading.Semaphore(ingest.entrez_retry_budget),
        sleep=ended.wait,
    )


def whole_window(ingest: IngestSettings, today: date) -> Window:
    """The window of the whole query: of the dates that are set, or of any day. E-utilities take no half-open range."""
    if not (ingest.date_from or ingest.date_to):
        return Window()
    every_day = open_days(today)
    first = ingest.date_from or min(every_day.first, ingest.date_to or every_day.first)
    return Window(Days(first, ingest.date_to or max(every_day.last, first)))


def checked_query(ingest: IngestSettings) -> str:
    """The query; UsageError when there is none or its dates are in the wrong order."""
    if not ingest.query or not ingest.query.strip():
        raise UsageError("the source is entrez, but there is no query; set DRZERO_INGEST__QUERY")
    if ingest.date_from and ingest.date_to and ingest.date_from > ingest.date_to:
        raise UsageError(
            f"DRZERO_INGEST__DATE_FROM is {ingest.date_from}, after DRZERO_INGEST__DATE_TO {ingest.date_to}"
        )
    return ingest.query


def checked_contact(address: str | None) -> str:
    """The e-mail address; UsageError when it is missing or does not look like one."""
    if address is None or not ADDRESS.fullmatch(address.strip()):
        found = "none" if address is None else repr(address)
        raise UsageError(
            f"NCBI asks every client for a contact: expected an e-mail address in DRZERO_INGEST__EMAIL, found {found}"
        )
    return address.strip()


def read_key(environ: Mapping[str, str]) -> str | None:
    """The NCBI key from `NCBI_API_KEY`, or from the file of `NCBI_API_KEY_FILE` (a Compose secret), or None."""
    if environ.get("NCBI_API_KEY"):
        return environ["NCBI_API_KEY"].strip()
    path = environ.get("NCBI_API_KEY_FILE")
    if not path:
        return None
    if not Path(path).is_file():
        raise UsageError(f"NCBI_API_KEY_FILE names {path}, but there is no such file")
    return Path(path).read_text(encoding="utf-8").strip() or None
