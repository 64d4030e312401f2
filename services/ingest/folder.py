"""A folder of PubMed XML files to papers: baseline and update files, plain or gzip, read recursively.

Two passes, each over several files at once. The first reads PMIDs only and settles which record of each PMID stands
(`versions`) and which files are malformed; the second parses the records that stand. So memory holds a few bytes per
PMID and the texts of a few files, and nothing of a malformed file enters: a truncated file says nothing about what its
lost half replaces or deletes. Files are taken in the order of their names, which NLM numbers through from the baseline
to the newest update. Where `<file>.md5` lies beside a file, a file that it does not fit is malformed.

When a corpus was made from the first of these files, just as they are, only those behind are read.
"""

import hashlib
import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import structlog
from isal import igzip, isal_zlib

from services.ingest.estimate import Estimate, of_files
from services.ingest.pubmed_xml import Deletion, MalformedXml, Record, read_records
from services.ingest.store import Base, Change
from services.ingest.versions import Events, settled
from services.ingest.workers import in_order
from shared.command import UsageError
from shared.files import hash_file, hash_json
from shared.pmids import number
from shared.progress import Progress
from shared.records import PAPER_FIELDS, Paper
from shared.settings import Settings

MALFORMED = "malformed.json"
SUFFIXES = (".xml", ".xml.gz")
GZIP_MAGIC = b"\x1f\x8b"
MD5 = re.compile(r"\b[0-9a-fA-F]{32}\b")
DAMAGED = (EOFError, igzip.BadGzipFile, cast(type[Exception], isal_zlib.IsalError))
MOST_PROCESSES = 8  # unless the settings name a number: each takes about 80 MB
COUNTED = ("read", "deletions", "dropped_duplicate", "dropped_deleted", "dropped_no_pmid")  # over all runs of a corpus
BATCH = 512  # papers that are packed and unpacked at once
values_of = attrgetter(*PAPER_FIELDS)


class XmlFolder:
    """The `xml` source. UsageError when the folder is missing or holds no PubMed XML file."""

    may_differ: frozenset[str] = frozenset()

    def __init__(self, settings: Settings, *, strict: bool) -> None:
        self.settings = settings
        self.strict = strict
        folder = settings.ingest.xml_dir
        if folder is None:
            raise UsageError("the source is xml, but no folder is named; set DRZERO_INGEST__XML_DIR")
        self.folder = folder
        self.files = find_files(folder)
        self.digests = [[str(p.relative_to(folder)), p.stat().st_size, hash_file(p), told_md5(p)] for p in self.files]
        self.made_from: Mapping[str, str] = {"xml": hash_json(self.digests)}
        self.shaped_by: Mapping[str, Any] = {}

    def estimate(self, base: Base) -> Estimate:
        """From the sizes of the files behind the base's."""
        files = self.files[len(base.origin["files"]) if base.origin else 0 :]
        packed = [path for path in files if path.suffix.lower() == ".gz"]
        total, of_packed = (sum(path.stat().st_size for path in paths) for paths in (files, packed))
        return of_files(of_packed, total - of_packed, processes=self._processes)

    def done(self) -> None:
        """Nothing is kept."""

    def goes_on_from(self, base: Base) -> bool:
        """Whether the base was made from the first of these files, as they are."""
        met = base.origin["files"]
        return bool(met) and self.digests[: len(met)] == met

    def change(self, base: Base, draft: Path) -> Change:
        """What the files behind the base's bring, in their order; writes `malformed.json` into the draft if any is."""
        met = base.origin["files"] if base.origin else []
        malformed = list(base.origin["malformed"]) if base.origin else []
        whole, scans = self._scan(self.files[len(met) :], malformed)
        if malformed:
            (draft / MALFORMED).write_text(json.dumps(malformed, indent=2) + "\n", encoding="utf-8")
        events = Events.joined(scans)
        known = settled(events, base.ledger)
        counts = Counter({name: base.counts.get(name, 0) for name in COUNTED})
        counts += Counter(
            read=int((~events.deletes).sum()),
            deletions=int(events.deletes.sum()),
            dropped_duplicate=known.replaced,
            dropped_deleted=known.deleted,
            dropped_no_pmid=int((~events.deletes & (events.pmids == 0)).sum()),
        )
        counts.update(files=len(self.files), files_malformed=len(malformed))
        structlog.get_logger().info("files are scanned", known=len(met), **counts)
        flags = np.split(known.stands, np.cumsum([len(scan.pmids) for scan in scans]))
        tasks = [
            (path, stands[~scan.deletes].tobytes())
            for path, scan, stands in zip(whole, scans, flags, strict=False)
            if stands.any()
        ]
        pmids = events.pmids[known.stands]
        papers = self._parsed(tasks, len(pmids))
        origin = {"files": self.digests, "malformed": malformed}
        return Change(known.remains, pmids, events.versions[known.stands], papers, counts, origin)

    def _parsed(self, tasks: Sequence[tuple[Path, bytes]], total: int) -> Iterator[Paper]:
        with (
            Progress("ingest", self.settings, total=total) as progress,
            closing(in_order(parse_file, tasks, self._processes)) as files,
        ):
            for batches in files:
                for batch in batches:
                    rows = pickle.loads(batch)  # noqa: S301 - written by our own worker
                    for row in rows:
                        progress.advance()
                        yield Paper(*row)

    @property
    def _processes(self) -> int:
        return min(self.settings.ingest.workers or min(os.cpu_count() or 1, MOST_PROCESSES), len(self.files))

    def _scan(self, files: Sequence[Path], malformed: list[dict[str, Any]]) -> tuple[list[Path], list[Events]]:
        """The whole files with what they hold; what is wrong with the others is added to `malformed`."""
        whole: list[Path] = []
        scans: list[Events] = []
        with (
            Progress("ingest-scan", self.settings, total=len(files), unit="file") as progress,
            closing(in_order(scanned, files, self._processes)) as results,
        ):
            for path, scan in zip(files, results, strict=True):
                if isinstance(scan, MalformedXml):
                    malformed.append(self._left_out(path, scan))
                else:
                    whole.append(path)
                    scans.append(scan)
                    records = len(scan.pmids) - int(scan.deletes.sum())
                    structlog.get_logger().info("file is scanned", file=str(path), records=records)
                progress.advance()
        return whole, scans

    def _left_out(self, path: Path, error: MalformedXml) -> dict[str, Any]:
        if self.strict:
            raise UsageError(f"{named(path, error)}; repair or remove it, or run without --strict") from error
        structlog.get_logger().warning(
            "file is malformed and left out", file=str(path), line=error.line, reason=error.reason
        )
        return {"file": str(path.relative_to(self.folder)), "line": error.line, "reason": error.reason}


def find_files(folder: Path) -> list[Path]:
    """PubMed XML files under `folder` by file name, then path; UsageError when there are none."""
    if not folder.is_dir():
        raise UsageError(f"expected a folder of PubMed XML at {folder}, found none; check DRZERO_INGEST__XML_DIR")
    files = [
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".") and path.is_file()
    ]
    if not files:
        raise UsageError(
            f"expected PubMed XML files (.xml or .xml.gz) in {folder}, found none; check DRZERO_INGEST__XML_DIR"
        )
    return sorted(files, key=lambda path: (path.name, str(path)))


def scan_file(path: Path) -> Events:
    """What one file holds; MalformedXml when it is not what its `.md5` names or does not read to its end."""
    told = told_md5(path)
    if told is not None:
        with path.open("rb") as raw:
            found = hashlib.file_digest(raw, _md5).hexdigest()
        if found != told:
            raise MalformedXml(f"its MD5 is {found}, {path.name}.md5 says {told or 'nothing'}; download it again")
    with opened(path) as stream:
        met = [(number(i.pmid), min(i.version, 255), isinstance(i, Deletion)) for i in read_records(stream)]
    pmids, versions, deletes = zip(*met, strict=True) if met else ((), (), ())
    return Events(np.array(pmids, np.int64), np.array(versions, np.uint8), np.array(deletes, bool))


def scanned(path: Path) -> Events | MalformedXml:
    """`scan_file` for a worker: the error is a result, so that the other files go on."""
    try:
        return scan_file(path)
    except MalformedXml as error:
        return error


def parse_file(task: tuple[Path, bytes]) -> list[bytes]:
    """The papers of one scanned file whose flag is 1, as pickled batches of `PAPER_FIELDS`; UsageError when it changed.

    Packed, a file's papers take less memory while they wait for their turn, and pickle is slow with slotted classes.
    """
    path, flags = task
    rows: list[tuple[Any, ...]] = []
    batches: list[bytes] = []
    try:
        with opened(path) as stream:
            records = (item for item in read_records(stream, checked=True) if isinstance(item, Record))
            for record, flag in zip_longest(records, flags):
                if record is None or flag is None:
                    raise MalformedXml(f"expected {len(flags)} records, found another number")
                if flag:
                    rows.append(values_of(record.paper()))
                if len(rows) == BATCH:
                    batches.append(pickle.dumps(rows))
                    rows = []
    except MalformedXml as error:  # it was whole when it was scanned
        raise UsageError(f"{named(path, error)}: it changed while it was read; run again") from error
    return [*batches, pickle.dumps(rows)]


def told_md5(path: Path) -> str | None:
    """What `<file>.md5` says, in NLM's form or md5sum's; "" when it names no digest, None when there is none."""
    beside = path.with_name(f"{path.name}.md5")
    if not beside.is_file():
        return None
    found = MD5.search(beside.read_text(encoding="utf-8", errors="replace"))
    return found.group().lower() if found else ""


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The uncompressed stream of a file; gzip is told by its first bytes. Damaged gzip becomes MalformedXml."""
    with path.open("rb") as raw:
        packed = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        try:
            yield cast(IO[bytes], igzip.IGzipFile(fileobj=raw)) if packed else raw  # type: ignore[no-untyped-call] # half typed
        except DAMAGED as error:
            raise MalformedXml(f"damaged gzip: {error}") from error


def named(path: Path, error: MalformedXml) -> str:
    """The sentence that names a malformed file."""
    return f"{path} is not readable PubMed XML (line {error.line}: {error.reason})"


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)  # NLM's check of a download, not a signature
