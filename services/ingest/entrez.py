"""A PubMed query to papers, through ESearch with history and EFetch in batches.

In: query, publication dates and contact of the settings; a key, if any, from `NCBI_API_KEY` or the file that
`NCBI_API_KEY_FILE` names. Out: papers in PubMed's order, with the counts found, asked, missing and read. At most
`max_records` are fetched (E-utilities give no more than 9,999 of one query); what is left out is counted and logged.
A corpus of the same query, dates and limit is reused: PubMed grows daily, so `--force` asks again.
"""

import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import structlog
from Bio import Entrez

from services.ingest.eutils import Caller, ErrorReply, call, configured, reply_root
from services.ingest.pubmed_xml import Record, read_records
from services.ingest.tally import drop
from services.ingest.versions import Place, Standing
from shared.command import UsageError
from shared.progress import Progress
from shared.records import Paper
from shared.settings import IngestSettings, Settings

ADDRESS = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s.]+")
OPEN_START, OPEN_END = "1000/01/01", "3000/12/31"  # E-utilities take no half-open range of dates


@dataclass(frozen=True)
class Found:
    """A search that NCBI keeps for us."""

    count: int
    web_env: str
    query_key: str
    remark: str  # what PubMed did not understand in the query, or ""


class EntrezQuery:
    """The `entrez` source. UsageError when query, dates, contact or key file do not do."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        ingest = settings.ingest
        if not ingest.query or not ingest.query.strip():
            raise UsageError("the source is entrez, but there is no query; set DRZERO_INGEST__QUERY")
        if ingest.date_from and ingest.date_to and ingest.date_from > ingest.date_to:
            raise UsageError(
                f"DRZERO_INGEST__DATE_FROM is {ingest.date_from}, after DRZERO_INGEST__DATE_TO {ingest.date_to}"
            )
        self.caller = Caller(
            base_url=ingest.entrez_url,
            contact=checked_contact(ingest.email),
            key=read_key(os.environ),
            timeout_s=ingest.entrez_timeout_s,
            tries=ingest.entrez_tries,
        )
        self.made_from: Mapping[str, str] = {
            "entrez_url": ingest.entrez_url,
            "query": ingest.query,
            "dates": f"{ingest.date_from or ''}..{ingest.date_to or ''}",
        }
        self.shaped_by: Mapping[str, Any] = {
            "require_abstract": ingest.require_abstract,
            "max_records": ingest.max_records,
        }

    def papers(self, counts: Counter[str], draft: Path) -> Iterator[Paper]:
        """The papers of the query; UsageError when it finds none, ServiceError when NCBI does not answer."""
        with configured(self.caller):
            fetched = self._fetch_all(counts)
        standing = Standing()
        for position, (version, paper) in enumerate(fetched):
            standing.add(paper.pmid, Place(0, position, version))
        drop(counts, "duplicate", standing.replaced)
        for position, (_, paper) in enumerate(fetched):
            if not standing.stands(paper.pmid, file=0, position=position):
                continue
            if self.settings.ingest.require_abstract and not paper.abstract:
                drop(counts, "no_abstract")
            else:
                yield paper

    def _fetch_all(self, counts: Counter[str]) -> list[tuple[int, Paper]]:
        log = structlog.get_logger()
        ingest = self.settings.ingest
        found = call(self.caller, Entrez.esearch, search_parameters(ingest), read_search)
        counts["found"] = found.count
        if found.count == 0:
            raise UsageError(f"PubMed finds no paper for {ingest.query!r}{found.remark}; change DRZERO_INGEST__QUERY")
        counts["asked"] = asked = min(found.count, ingest.max_records)
        log.info("query is answered", found=found.count, asked=asked, remark=found.remark.strip(" ;()"))
        if found.count > asked:
            log.warning(
                "the query finds more papers than are fetched; narrow it or its dates",
                found=found.count,
                asked=asked,
                left_out=found.count - asked,
            )
        fetched: list[tuple[int, Paper]] = []
        with Progress("ingest", self.settings, total=asked) as progress:
            for start in range(0, asked, ingest.entrez_batch):
                batch = self._fetch(found, start, min(ingest.entrez_batch, asked - start))
                fetched += batch
                progress.advance(len(batch))
        counts["read"] = len(fetched)
        counts["missing"] = max(0, asked - len(fetched))
        if counts["missing"]:
            log.warning("NCBI sent fewer papers than it found", asked=asked, read=len(fetched))
        return fetched

    def _fetch(self, found: Found, start: int, size: int) -> list[tuple[int, Paper]]:
        parameters = {
            "db": "pubmed",
            "WebEnv": found.web_env,
            "query_key": found.query_key,
            "retstart": start,
            "retmax": size,
            "retmode": "xml",
        }
        batch = call(self.caller, Entrez.efetch, parameters, read_batch)
        if len(batch) < size:  # a whole reply with records lacking: once more, then what is there is taken and counted
            batch = max(batch, call(self.caller, Entrez.efetch, parameters, read_batch), key=len)
        return batch


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


def search_parameters(ingest: IngestSettings) -> dict[str, Any]:
    """ESearch's parameters; the dates are publication dates, both ends included."""
    parameters: dict[str, Any] = {"db": "pubmed", "term": ingest.query, "usehistory": "y", "retmax": 0}
    if ingest.date_from or ingest.date_to:
        parameters |= {
            "datetype": "pdat",
            "mindate": _day(ingest.date_from, OPEN_START),
            "maxdate": _day(ingest.date_to, OPEN_END),
        }
    return parameters


def read_search(body: bytes) -> Found:
    """ESearch's reply; ErrorReply when it is something else."""
    root = reply_root(body, "eSearchResult")
    count = root.findtext("Count") or ""
    if not count.isdecimal():
        raise ErrorReply(f"ESearch's Count is {count!r}, expected a number")
    env, key = root.findtext("WebEnv") or "", root.findtext("QueryKey") or ""
    if int(count) and not (env and key):
        raise ErrorReply("ESearch found papers, but its reply lacks WebEnv and QueryKey")
    unknown = [e.text for name in ("PhraseNotFound", "FieldNotFound") for e in root.iter(name) if e.text]
    return Found(int(count), env, key, f" (not understood: {', '.join(unknown)})" if unknown else "")


def read_batch(body: bytes) -> list[tuple[int, Paper]]:
    """PMID versions and papers of EFetch's reply; ErrorReply when it is something else, MalformedXml when cut off."""
    if b"<PubmedArticleSet" not in body[:2000]:
        reply_root(body, "PubmedArticleSet")
    records = read_records(io.BytesIO(body))
    return [(record.version, record.paper()) for record in records if isinstance(record, Record)]


def _day(day: date | None, default: str) -> str:
    return default if day is None else day.strftime("%Y/%m/%d")
