"""The papers of a plan, fetched by several threads in batches and kept as files until all are there.

In: a `Job` and the PMIDs to fetch. Out: `Fetched`: which came, and their papers in the order of the plan, whatever the
number of threads and the faults of the service. The folder of the job holds EFetch's replies as they came, gzipped, one
file a batch; what is there is not asked for again. PMIDs that a reply lacks are asked for again in later turns, all
together, until they have come or `TURNS` are over.
"""

import gzip
import io
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import structlog
from Bio import Entrez

from services.ingest.eutils import Caller, ErrorReply, call, reply_root
from services.ingest.pubmed_xml import MalformedXml, Record, read_records
from shared.pmids import number
from shared.records import Paper

TURNS = 8  # one when nothing is missing
DAMAGED = (OSError, EOFError, zlib.error, MalformedXml, ErrorReply)

Versions = dict[int, int]  # PMID → its version


@dataclass(frozen=True)
class Job:
    """Who fetches, how many papers by one call, by how many calls at once, and where the replies are kept."""

    caller: Caller
    batch: int
    workers: int
    folder: Path
    ended: threading.Event  # set when the run fails or is interrupted


@dataclass(frozen=True)
class Fetched:
    """What came: PMID → version, the files of the first turn with what they were to hold, and those of later turns."""

    versions: Mapping[int, int]
    batches: Mapping[Path, Sequence[int]]
    later: Sequence[Path]

    def papers(self) -> Iterator[Paper]:
        """The papers that came, in the order in which they were asked for."""
        late = dict(pair for path in self.later for pair in papers_of(path).items())
        for path, pmids in self.batches.items():
            papers = papers_of(path)
            yield from (papers.get(pmid) or late[pmid] for pmid in pmids if pmid in papers or pmid in late)


def fetched(job: Job, pmids: Sequence[int], arrived: Callable[[int], None]) -> Fetched:
    """Fetch and keep these papers; `arrived` is told how many have come, as they come."""
    versions: Versions = {}
    files: list[dict[Path, Sequence[int]]] = []
    for turn in range(TURNS):
        left = [pmid for pmid in pmids if pmid not in versions]
        if not left:
            break
        if turn:
            structlog.get_logger().info("papers that did not come are asked for again", papers=len(left), turn=turn)
        files.append(
            {batch_file(job.folder, turn, at): left[at : at + job.batch] for at in range(0, len(left), job.batch)}
        )
        versions |= fetch_turn(job, files[-1], arrived)
    later = [path for turn in files[1:] for path in turn]
    return Fetched(versions, files[0] if files else {}, later)


def fetch_turn(job: Job, batches: Mapping[Path, Sequence[int]], arrived: Callable[[int], None]) -> Versions:
    """Fetch the batches that are not kept; the first failure ends the others and is raised."""
    job.folder.mkdir(parents=True, exist_ok=True)
    versions: Versions = {}
    with ThreadPoolExecutor(job.workers) as pool:
        try:
            for done in as_completed([pool.submit(fetch_batch, job.caller, *batch) for batch in batches.items()]):
                versions |= done.result()
                arrived(len(done.result()))
        except BaseException:
            job.ended.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return versions


def fetch_batch(caller: Caller, path: Path, pmids: Sequence[int]) -> Versions:
    """The versions of those of these papers that NCBI sends; from the file when it is kept, else kept there."""
    try:
        _, kept = read_batch(read_kept(path), pmids)
    except DAMAGED:  # not there, or damaged by a loss of power
        parameters = {"db": "pubmed", "id": ",".join(map(str, pmids)), "retmode": "xml"}
        body, kept = call(caller, Entrez.efetch, parameters, lambda reply: read_batch(reply, pmids))
        keep(path, body)
    return kept


def read_batch(body: bytes, pmids: Sequence[int]) -> tuple[bytes, Versions]:
    """EFetch's reply, and the versions of those of these papers that are in it.

    ErrorReply when it is something else, MalformedXml when it is cut off.
    """
    asked = set(pmids)
    found = ((number(record.pmid), record.version) for record in records_of(body))
    return body, {pmid: version for pmid, version in sorted(found) if pmid in asked}


def papers_of(path: Path) -> dict[int, Paper]:
    """PMID → paper of a kept reply, of several versions the highest."""
    records = [(r.version, number(r.pmid), r.paper()) for r in records_of(read_kept(path), checked=True)]
    return {pmid: paper for _, pmid, paper in sorted(records, key=lambda record: record[:2])}


def records_of(body: bytes, *, checked: bool = False) -> Iterator[Record]:
    """The records of EFetch's reply, as `read_records` gives them; `checked` when it was read to its end before."""
    if b"<PubmedArticleSet" not in body[:2000]:
        reply_root(body, "PubmedArticleSet")
    return (record for record in read_records(io.BytesIO(body), checked=checked) if isinstance(record, Record))


def batch_file(folder: Path, turn: int, start: int) -> Path:
    """Where the batch is kept that begins at paper `start` of a turn."""
    return folder / f"{turn}-{start:08d}.xml.gz"


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
