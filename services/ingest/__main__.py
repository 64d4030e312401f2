"""PubMed to corpus: `python -m services.ingest`.

In: the settings of `DRZERO_INGEST__*`, or the flags that stand for some of them; the source is a folder of PubMed XML,
an Entrez query or the shipped demo records. Out: `<data_dir>/corpus` (shards and a manifest with the fate of every
record). A corpus that was made from the same input by the same settings is reused; an interrupted fetch goes on where
it was. On an error or interruption the corpus of before stays as it was.
Exit status: 0 done or reused, 1 a known error, 2 wrong settings, 130 interrupted.
"""

import argparse
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import structlog

from services.ingest.estimate import Estimate
from services.ingest.tally import settle
from shared.command import UsageError, run
from shared.corpus import Corpus, write_shards
from shared.files import publish, read_manifest, require_free_space, stale_reason
from shared.records import Paper
from shared.settings import IngestSettings, Settings

FLAGS = {
    "query": "DRZERO_INGEST__QUERY",
    "from": "DRZERO_INGEST__DATE_FROM",
    "to": "DRZERO_INGEST__DATE_TO",
    "max": "DRZERO_INGEST__MAX_RECORDS",
    "xml_dir": "DRZERO_INGEST__XML_DIR",
}


class Source(Protocol):
    """Where papers come from. `made_from` and `shaped_by` go into the manifest; `papers` counts what it reads."""

    made_from: Mapping[str, str]
    shaped_by: Mapping[str, Any]

    def papers(self, counts: Counter[str], draft: Path) -> Iterator[Paper]:
        """The papers to keep, in corpus order; files put into `draft` become part of the artifact."""

    def estimate(self) -> Estimate:
        """What the run will take; reads sizes and counts only."""

    def done(self) -> None:
        """The corpus is published: what was kept for a resume may go."""


def chosen_source(ingest: IngestSettings) -> str:
    """The name of the source these settings ask for."""
    if ingest.source != "auto":
        return ingest.source
    if ingest.xml_dir is not None:
        return "xml"
    return "entrez" if ingest.query is not None else "demo"


def make_source(name: str, settings: Settings, *, strict: bool) -> Source:
    """The source of this name; UsageError when its own settings do not do."""
    if name == "xml":
        from services.ingest.folder import XmlFolder

        return XmlFolder(settings, strict=strict)
    if name == "entrez":
        from services.ingest.entrez import EntrezQuery

        return EntrezQuery(settings)
    from services.ingest.demo import DemoRecords

    return DemoRecords(settings)


def ingest(settings: Settings, log: structlog.stdlib.BoundLogger, arguments: argparse.Namespace) -> None:
    """Make the corpus, or reuse the one that is there; with --dry-run only say what that would take."""
    name = chosen_source(settings.ingest)
    strict = arguments.strict or settings.ingest.strict
    source = make_source(name, settings, strict=strict)
    target = settings.storage.data_dir / "corpus"
    shaped_by = {"source": name, "shard_rows": settings.ingest.shard_rows, **source.shaped_by}
    reason = stale_reason(target, settings=shaped_by, made_from=source.made_from)
    if arguments.dry_run:
        log.info("dry run: nothing is fetched or written", source=name, why=reason, **source.estimate().told())
        return
    if arguments.fresh:
        source.done()
    if reason is None:
        manifest = read_manifest(target)
        # A corpus that left malformed files out is not what --strict promises, so strict reads them again and stops.
        if not arguments.force and not (strict and manifest.counts.get("files_malformed")):
            log.info("corpus is reused", path=str(target), rows=manifest.rows, **manifest.counts)
            source.done()  # a kill between publishing and this line leaves kept replies behind
            return
        reason = "--force" if arguments.force else "--strict, and files were left out as malformed"
    log.info("corpus is made", source=name, path=str(target), why=reason)
    require_free_space(settings.storage.data_dir, settings.storage.min_free_gb)
    counts: Counter[str] = Counter()
    with publish(target, settings=shaped_by, made_from=source.made_from) as draft:
        draft.rows = write_shards(source.papers(counts, draft.path), draft.path, settings.ingest.shard_rows)
        draft.counts = settle(counts, draft.rows)
        if draft.rows == 0:
            raise UsageError(f"expected papers to keep, found none ({_told(draft.counts)}); the corpus stays as it was")
    source.done()
    log.info("corpus is ready", path=str(target), rows=draft.rows, **draft.counts)


def export(corpus: Corpus, path: Path) -> int:
    """Write the corpus as JSON lines with the keys of the contract; the file appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as stream:
            for paper in corpus:
                stream.write(json.dumps(paper.as_record(), ensure_ascii=False) + "\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return len(corpus)


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; flags that stand for settings are put into the environment, where they win over the profile."""
    parser = argparse.ArgumentParser(prog="python -m services.ingest", description="PubMed to corpus.")
    where = parser.add_argument_group("what to fetch (each stands for a setting, see `make settings`)")
    where.add_argument("--query", help="PubMed query in Entrez syntax; needs DRZERO_INGEST__EMAIL")
    where.add_argument("--from", metavar="DATE", help="first publication date of the query, YYYY-MM-DD")
    where.add_argument("--to", metavar="DATE", help="last publication date of the query, YYYY-MM-DD")
    where.add_argument("--max", metavar="N", help="most records fetched")
    where.add_argument("--xml-dir", metavar="FOLDER", help="folder of PubMed XML files, read recursively")
    parser.add_argument("--jsonl", type=Path, metavar="FILE", help="export the corpus as JSON lines as well")
    parser.add_argument("--dry-run", action="store_true", help="count, and estimate time and disk; fetch nothing")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with an interrupted fetch; the default, spelt out")
    again.add_argument("--fresh", action="store_true", help="forget what an interrupted fetch has kept")
    parser.add_argument("--strict", action="store_true", help="stop at the first malformed XML file")
    parser.add_argument("--force", action="store_true", help="make the corpus again even when nothing changed")
    arguments = parser.parse_args(words)
    if arguments.query is not None and arguments.xml_dir is not None:
        parser.error("--query and --xml-dir name two sources; give one of them")
    given = {FLAGS[name]: value for name, value in vars(arguments).items() if name in FLAGS and value is not None}
    if arguments.query is not None or arguments.xml_dir is not None:
        given["DRZERO_INGEST__SOURCE"] = "xml" if arguments.query is None else "entrez"
    os.environ.update(given)
    return arguments


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    arguments = parse()
    # SIGTERM unwinds like Ctrl-C, so that the draft is removed; as a container's first process it would be ignored.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def work(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
        ingest(settings, log, arguments)
        if arguments.jsonl is not None and not arguments.dry_run:
            rows = export(Corpus(settings.storage.data_dir / "corpus"), arguments.jsonl)
            log.info("corpus is exported", path=str(arguments.jsonl), rows=rows)

    return run("ingest", work)


if __name__ == "__main__":
    raise SystemExit(main())
