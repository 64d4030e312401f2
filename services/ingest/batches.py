"""The batches of a PubMed query: planned, fetched by several threads, and kept as files until all are there.

In: a `Job`. Out: for every batch, in an order that depends on the plan alone, its kept file and the PMIDs in it. The
folder of the job holds `plan.json` and one folder per window and count, with EFetch's replies as they came, gzipped.
What is there is not asked for again; a window whose count has changed meanwhile is fetched anew, because the positions
of its papers have moved.

A batch that lacks papers is not believed blindly: it is asked for again until the same records come twice.
"""

import gzip
import io
import os
import shutil
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path

import structlog
from Bio import Entrez

from services.ingest.eutils import SERVICE, Caller, ErrorReply, HistoryLost, call, reply_root
from services.ingest.pubmed_xml import MalformedXml, Record, read_records
from services.ingest.searches import History, agreed_search, count, search
from services.ingest.windows import CAP, Plan, Window, agreed, cut, open_days, read_plan, write_plan
from shared.clients import BadReply
from shared.command import UsageError

PLAN = "plan.json"
SAME_TRIES = 12  # how often a batch is asked for until it is whole or the same records come twice

Named = tuple[str, int]  # PMID, "" when there is none, and its version


@dataclass(frozen=True)
class Job:
    """What is fetched by whom, where it is kept, and how many calls are in flight at once."""

    caller: Caller
    query: str
    whole: Window
    limit: int
    batch: int
    workers: int
    folder: Path
    ended: threading.Event  # set when the run fails or is interrupted


def made_plan(job: Job) -> Plan:
    """The kept plan of an interrupted run, or a new one, which is kept; UsageError when the query finds nothing."""
    log = structlog.get_logger()
    kept = read_plan(job.folder / PLAN)
    if kept:
        log.info("an interrupted run goes on", found=kept.found, windows=len(kept.windows), begun=str(kept.begun))
        return kept
    first = search(job.caller, job.query, job.whole)
    found = first.count
    if not 0 < found <= CAP:  # too much hangs on this number to believe one reply
        found = agreed(partial(count, job.caller, job.query, job.whole), found)
    if found == 0:
        raise UsageError(f"PubMed finds no paper for {job.query!r}{first.remark}; change DRZERO_INGEST__QUERY")
    windows = cut(
        partial(count, job.caller, job.query), job.whole, found, every_day=open_days(_today()), limit=job.limit
    )
    plan = Plan(windows, found, _today())
    write_plan(job.folder / PLAN, plan)
    log.info("query is answered", found=found, windows=len(windows), remark=first.remark.strip(" ;()"))
    if found > job.limit:
        log.warning(
            "the query finds more papers than are fetched; narrow it or its dates, or raise the limit",
            found=found,
            asked=job.limit,
            left_out=found - job.limit,
        )
    return plan


def fetched(
    job: Job, plan: Plan, counts: Counter[str], arrived: Callable[[int], None]
) -> Iterator[tuple[Path, Sequence[Named]]]:
    """File and records of every batch in order; `arrived` is told the number of records of each as it comes.

    Counts found, windows and asked.
    """
    left, number = job.limit, 0
    while left > 0 and number < len(plan.windows):
        window, papers = list(plan.windows.items())[number]
        sizes = batch_sizes(min(papers, left), job.batch)
        folder = job.folder / f"{window}_{papers}"
        batches = kept_batches(folder, sizes, arrived)
        if len(batches) < len(sizes):
            history = History(partial(agreed_search, job.caller, job.query, window, papers))
            if history.found.count != papers:
                plan = changed(job, plan, window, history.found.count)
                continue
            missing = {start: size for start, size in sizes.items() if start not in batches}
            batches |= fetch_missing(job, history, folder, missing, arrived)
        yield from ((batch_file(folder, start), batches[start]) for start in sizes)
        counts["asked"] += sum(sizes.values())
        left -= sum(sizes.values())
        number += 1
    counts["found"], counts["windows"] = plan.found, number
    if counts["asked"] < min(plan.found, job.limit):
        check_sum(job, counts["asked"])


def check_sum(job: Job, asked: int) -> None:
    """BadReply when the windows hold fewer papers than the query still finds; the next run plans anew then."""
    found = agreed(partial(count, job.caller, job.query, job.whole))
    if asked < min(found, job.limit):
        (job.folder / PLAN).unlink()
        raise BadReply(SERVICE, f"finds {found} papers, but {asked} in all windows together; run again to plan anew")


def changed(job: Job, plan: Plan, window: Window, papers: int) -> Plan:
    """The plan, kept, with the count that a window has by now, or with its parts when that is too large."""
    structlog.get_logger().warning(
        "a window has another count than before", window=str(window), before=plan.windows[window], now=papers
    )
    parts = cut(partial(count, job.caller, job.query), window, papers, every_day=open_days(_today()), limit=job.limit)
    windows: dict[Window, int] = {}
    for old, number in plan.windows.items():
        windows |= parts if old == window else {old: number}
    new = Plan(windows, papers if window == job.whole else plan.found, plan.begun)
    write_plan(job.folder / PLAN, new)
    shutil.rmtree(job.folder / f"{window}_{plan.windows[window]}", ignore_errors=True)
    return new


def fetch_missing(
    job: Job, history: History, folder: Path, sizes: dict[int, int], arrived: Callable[[int], None]
) -> dict[int, Sequence[Named]]:
    """Fetch and keep the batches of these starts and sizes; the first failure ends the others and is raised."""
    folder.mkdir(parents=True, exist_ok=True)

    def fetch(start: int) -> tuple[int, Sequence[Named]]:
        body, records = fetch_batch(job.caller, history, start, sizes[start])
        keep(batch_file(folder, start), body)
        return start, records

    batches: dict[int, Sequence[Named]] = {}
    with ThreadPoolExecutor(job.workers) as pool:
        try:
            for done in as_completed([pool.submit(fetch, start) for start in sizes]):
                start, records = done.result()
                batches[start] = records
                arrived(len(records))
        except BaseException:
            job.ended.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return batches


def fetch_batch(caller: Caller, history: History, start: int, size: int) -> tuple[bytes, Sequence[Named]]:
    """Reply and records of one batch: `size` records, or fewer when the same come twice."""
    seen: list[Sequence[Named]] = []
    found, losses = history.found, 0
    while len(seen) < SAME_TRIES:
        parameters = {
            "db": "pubmed",
            "WebEnv": found.web_env,
            "query_key": found.query_key,
            "retstart": start,
            "retmax": size,
            "retmode": "xml",
        }
        try:
            body, records = call(caller, Entrez.efetch, parameters, partial(read_batch, most=size))
        except HistoryLost as lost:
            losses += 1
            if losses == caller.tries:
                raise
            structlog.get_logger().warning("NCBI has lost a search, which is made again", problem=str(lost))
            found = history.renewed(found)
            continue
        if len(records) == size or records in seen:
            return body, records
        seen.append(records)
    raise BadReply(SERVICE, f"sent no batch of {size} papers in {SAME_TRIES} tries, and no two alike; run again later")


def read_batch(body: bytes, most: int) -> tuple[bytes, tuple[Named, ...]]:
    """EFetch's reply and its records; ErrorReply when it is something else or holds more than `most`.

    MalformedXml when it is cut off.
    """
    records = tuple((record.pmid, record.version) for record in records_of(body))
    if len(records) > most:
        raise ErrorReply(f"EFetch sent {len(records)} papers, asked for {most}")
    return body, records


def records_of(body: bytes, *, checked: bool = False) -> Iterator[Record]:
    """The records of EFetch's reply, as `read_records` gives them; `checked` when it was read to its end before."""
    if b"<PubmedArticleSet" not in body[:2000]:
        reply_root(body, "PubmedArticleSet")
    return (record for record in read_records(io.BytesIO(body), checked=checked) if isinstance(record, Record))


def batch_sizes(papers: int, batch: int) -> dict[int, int]:
    """Start → size of the batches of so many papers."""
    return {start: min(batch, papers - start) for start in range(0, papers, batch)}


def batch_file(folder: Path, start: int) -> Path:
    """Where the batch that begins at paper `start` of a window is kept."""
    return folder / f"{start:04d}.xml.gz"


def kept_batches(folder: Path, sizes: dict[int, int], arrived: Callable[[int], None]) -> dict[int, Sequence[Named]]:
    """Start → records of the batches that are kept and whole."""
    batches: dict[int, Sequence[Named]] = {}
    for start, size in sizes.items():
        try:
            _, batches[start] = read_batch(read_kept(batch_file(folder, start)), most=size)
        except (OSError, EOFError, zlib.error, MalformedXml, ErrorReply):  # not there, or damaged by a loss of power
            continue
        arrived(len(batches[start]))
    return batches


def keep(path: Path, body: bytes) -> None:
    """Keep one reply; a file of this name is always whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        stream.write(gzip.compress(body, compresslevel=6, mtime=0))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def read_kept(path: Path) -> bytes:
    """A kept reply; OSError, EOFError or zlib.error when there is none or it is damaged."""
    return gzip.decompress(path.read_bytes())


def _today() -> date:
    return datetime.now(UTC).date()
