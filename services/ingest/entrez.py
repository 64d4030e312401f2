"""A PubMed query of any size to papers, through ESearch with history and EFetch in batches.

In: query, publication dates and contact of the settings; a key, if any, from `NCBI_API_KEY` or the file that
`NCBI_API_KEY_FILE` names. Out: papers, newest first, with the counts found, windows, asked, missing and read. At most
`max_records` are fetched: of 9,999 or fewer the first of PubMed's own order, of more the newest by publication date;
what is left out is counted and logged.

Every batch is kept under `<scratch_dir>/ingest/<query>` until `done()`, so that a run that was killed goes on where it
was, and the corpus is made from the kept batches in their order: it depends neither on the number of workers nor on
faults or interruptions. A corpus of the same query, dates and limit is reused: PubMed grows daily, so `--force` asks
again.
"""

import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import structlog

from services.ingest.batches import Job, fetched, made_plan, read_kept, records_of
from services.ingest.estimate import Estimate, of_query
from services.ingest.eutils import Caller, configured
from services.ingest.filters import excluded_pmids, filter_settings, kept
from services.ingest.pace import RATE, RATE_WITH_KEY, make_pace
from services.ingest.searches import count
from services.ingest.tally import drop
from services.ingest.versions import Place, Standing
from services.ingest.windows import CAP, Days, Window, open_days
from shared.command import UsageError
from shared.files import hash_json
from shared.progress import Progress
from shared.records import Paper
from shared.settings import IngestSettings, Settings

ADDRESS = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s.]+")


class EntrezQuery:
    """The `entrez` source. UsageError when query, dates, contact or key file do not do."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        ingest = settings.ingest
        query = checked_query(ingest)
        self.made_from: Mapping[str, str] = {
            "entrez_url": ingest.entrez_url,
            "query": query,
            "dates": f"{ingest.date_from or ''}..{ingest.date_to or ''}",
        }
        self.excluded = excluded_pmids(ingest)
        self.shaped_by: Mapping[str, Any] = {
            **filter_settings(ingest, self.excluded),
            "max_records": ingest.max_records,
        }
        ended = threading.Event()
        identity = hash_json([self.made_from, ingest.max_records, ingest.entrez_batch, CAP])
        self.job = Job(
            caller=make_caller(settings, ended),
            query=query,
            whole=whole_window(ingest, datetime.now(UTC).date()),
            limit=ingest.max_records,
            batch=ingest.entrez_batch,
            workers=ingest.entrez_workers,
            folder=settings.storage.scratch_dir / "ingest" / identity[:16],
            ended=ended,
        )

    def papers(self, counts: Counter[str], draft: Path) -> Iterator[Paper]:
        """The papers of the query; UsageError when it finds none, ServiceError when NCBI does not answer."""
        standing, files = self._fetch(counts)
        drop(counts, "duplicate", standing.replaced)
        yield from kept(_standing_papers(files, standing), self.settings.ingest, self.excluded, counts)

    def done(self) -> None:
        """Remove the kept batches: the corpus is published."""
        if self.job.folder.exists():
            shutil.rmtree(self.job.folder)

    def estimate(self) -> Estimate:
        """What the run will take; asks PubMed for the number of papers only."""
        ingest, caller = self.settings.ingest, self.job.caller
        with configured(caller):
            found = count(caller, self.job.query, self.job.whole)
        rate = ingest.entrez_rate or (RATE_WITH_KEY if caller.key else RATE)
        return of_query(found, limit=self.job.limit, batch=self.job.batch, cap=CAP, rate=rate)

    def _fetch(self, counts: Counter[str]) -> tuple[Standing, list[Path]]:
        """Fetch what is not kept yet; which records stand, and the kept batches in order."""
        standing, files, job = Standing(), list[Path](), self.job
        with configured(job.caller):
            plan = made_plan(job)
            with Progress("ingest", self.settings, total=min(plan.found, job.limit)) as progress:
                for path, records in fetched(job, plan, counts, progress.advance):
                    for position, (pmid, version) in enumerate(records):
                        if pmid:
                            standing.add(pmid, Place(len(files), position, version))
                        else:
                            drop(counts, "no_pmid")
                    counts["read"] += len(records)
                    files.append(path)
        counts["missing"] = counts["asked"] - counts["read"]
        if counts["missing"]:
            structlog.get_logger().warning(
                "NCBI sent fewer papers than it found", asked=counts["asked"], read=counts["read"]
            )
        return standing, files


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


def _standing_papers(files: list[Path], standing: Standing) -> Iterator[Paper]:
    for number, path in enumerate(files):
        for position, record in enumerate(records_of(read_kept(path), checked=True)):
            if standing.stands(record.pmid, file=number, position=position):
                yield record.paper()
