"""A folder of PubMed XML files to papers: baseline and update files, plain or gzip, read recursively.

Two passes. The first reads PMIDs only and settles which record of each PMID stands (`versions`) and which files are
malformed; the second parses the records that stand. So memory holds one small entry per PMID and never the texts,
and nothing of a malformed file enters: a truncated file says nothing about what its lost half replaces or deletes.
Files are taken in the order of their names, which NLM numbers through from the baseline to the newest update.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import structlog

from services.ingest.pubmed_xml import Deletion, MalformedXml, Record, read_records
from services.ingest.tally import drop
from services.ingest.versions import Place, Standing
from shared.command import UsageError
from shared.files import hash_file, hash_json
from shared.progress import Progress
from shared.records import Paper
from shared.settings import Settings

MALFORMED = "malformed.json"
SUFFIXES = (".xml", ".xml.gz")
GZIP_MAGIC = b"\x1f\x8b"


class XmlFolder:
    """The `xml` source. UsageError when the folder is missing or holds no PubMed XML file."""

    def __init__(self, settings: Settings, *, strict: bool) -> None:
        self.settings = settings
        self.strict = strict
        folder = settings.ingest.xml_dir
        if folder is None:
            raise UsageError("the source is xml, but no folder is named; set DRZERO_INGEST__XML_DIR")
        self.folder = folder
        self.files = find_files(folder)
        digests = [(str(p.relative_to(folder)), p.stat().st_size, hash_file(p)) for p in self.files]
        self.made_from: Mapping[str, str] = {"xml": hash_json(digests)}
        self.shaped_by: Mapping[str, Any] = {"require_abstract": settings.ingest.require_abstract}

    def papers(self, counts: Counter[str], draft: Path) -> Iterator[Paper]:
        """The papers that stand, in the order of the files; writes `malformed.json` into the draft if any file is."""
        log = structlog.get_logger()
        counts["files"] = len(self.files)
        standing, malformed = self._scan(counts)
        counts["files_malformed"] = len(malformed)
        if malformed:
            reasons = [{"file": str(p.relative_to(self.folder)), **why} for p, why in malformed.items()]
            (draft / MALFORMED).write_text(json.dumps(reasons, indent=2) + "\n", encoding="utf-8")
        drop(counts, "duplicate", standing.replaced)
        drop(counts, "deleted", standing.deleted)
        log.info("all files are scanned", files=len(self.files), malformed=len(malformed), records=counts["read"])
        with Progress("ingest", self.settings, total=len(standing.places)) as progress:
            for number, path in enumerate(self.files):
                if path in malformed:
                    continue
                for record in self._standing_records(number, path, standing):
                    progress.advance()
                    paper = record.paper()
                    if self.settings.ingest.require_abstract and not paper.abstract:
                        drop(counts, "no_abstract")
                    else:
                        yield paper

    def _scan(self, counts: Counter[str]) -> tuple[Standing, dict[Path, dict[str, Any]]]:
        log = structlog.get_logger()
        standing = Standing()
        malformed: dict[Path, dict[str, Any]] = {}
        with Progress("ingest-scan", self.settings, total=len(self.files), unit="file") as progress:
            for number, path in enumerate(self.files):
                try:
                    items = scan_file(path, number)
                except MalformedXml as error:
                    if self.strict:
                        raise UsageError(
                            f"{named(path, error)}; repair or remove it, or run without --strict"
                        ) from error
                    log.warning("file is malformed and left out", file=str(path), line=error.line, reason=error.reason)
                    malformed[path] = {"line": error.line, "reason": error.reason}
                else:
                    _settle(items, standing, counts)
                    log.info("file is scanned", file=str(path), records=sum(isinstance(i[1], Place) for i in items))
                progress.advance()
        return standing, malformed

    def _standing_records(self, number: int, path: Path, standing: Standing) -> Iterator[Record]:
        try:
            with opened(path) as stream:
                records = (item for item in read_records(stream) if isinstance(item, Record))
                for position, record in enumerate(records):
                    if standing.stands(record.pmid, file=number, position=position):
                        yield record
        except MalformedXml as error:  # it was whole in the first pass
            raise UsageError(f"{named(path, error)}: it changed while it was read; run again") from error


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


def scan_file(path: Path, number: int) -> list[tuple[str, Place | Deletion]]:
    """PMID and place, or deletion, of everything in one file; MalformedXml when it does not read to its end."""
    items: list[tuple[str, Place | Deletion]] = []
    position = 0
    with opened(path) as stream:
        for item in read_records(stream):
            if isinstance(item, Deletion):
                items.append((item.pmid, item))
            else:
                items.append((item.pmid, Place(number, position, item.version)))
                position += 1
    return items


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The uncompressed stream of a file; gzip is told by its first bytes. Damaged gzip becomes MalformedXml."""
    with path.open("rb") as raw:
        packed = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        try:
            yield cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if packed else raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise MalformedXml(f"damaged gzip: {error}") from error


def named(path: Path, error: MalformedXml) -> str:
    """The sentence that names a malformed file."""
    return f"{path} is not readable PubMed XML (line {error.line}: {error.reason})"


def _settle(items: list[tuple[str, Place | Deletion]], standing: Standing, counts: Counter[str]) -> None:
    for pmid, item in items:
        if isinstance(item, Deletion):
            counts["deletions"] += 1
            standing.delete(pmid, item.version)
            continue
        counts["read"] += 1
        if pmid:
            standing.add(pmid, item)
        else:
            drop(counts, "no_pmid")
