"""PubMed to corpus: `python -m services.ingest [--strict] [--force]`.

In: the settings of `DRZERO_INGEST__*`; the source is a folder of PubMed XML, an Entrez query or the shipped demo
records. Out: `<data_dir>/corpus` (shards and a manifest with the fate of every record). A corpus that was made from
the same input by the same settings is reused. On an error or interruption the corpus of before stays as it was.
Exit status: 0 done or reused, 1 a known error, 2 wrong settings, 130 interrupted.
"""

import argparse
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import structlog

from services.ingest.tally import settle
from shared.command import UsageError, run
from shared.corpus import write_shards
from shared.files import publish, read_manifest, require_free_space, stale_reason
from shared.records import Paper
from shared.settings import IngestSettings, Settings


class Source(Protocol):
    """Where papers come from. `made_from` and `shaped_by` go into the manifest; `papers` counts what it reads."""

    made_from: Mapping[str, str]
    shaped_by: Mapping[str, Any]

    def papers(self, counts: Counter[str], draft: Path) -> Iterator[Paper]:
        """The papers to keep, in corpus order; files put into `draft` become part of the artifact."""


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


def ingest(settings: Settings, log: structlog.stdlib.BoundLogger, *, strict: bool, force: bool) -> None:
    """Make the corpus, or reuse the one that is there."""
    name = chosen_source(settings.ingest)
    source = make_source(name, settings, strict=strict)
    target = settings.storage.data_dir / "corpus"
    shaped_by = {"source": name, "shard_rows": settings.ingest.shard_rows, **source.shaped_by}
    reason = stale_reason(target, settings=shaped_by, made_from=source.made_from)
    if reason is None:
        manifest = read_manifest(target)
        # A corpus that left malformed files out is not what --strict promises, so strict reads them again and stops.
        if not force and not (strict and manifest.counts.get("files_malformed")):
            log.info("corpus is reused", path=str(target), rows=manifest.rows, **manifest.counts)
            return
        reason = "--force" if force else "--strict, and files were left out as malformed"
    log.info("corpus is made", source=name, path=str(target), why=reason)
    require_free_space(settings.storage.data_dir, settings.storage.min_free_gb)
    counts: Counter[str] = Counter()
    with publish(target, settings=shaped_by, made_from=source.made_from) as draft:
        draft.rows = write_shards(source.papers(counts, draft.path), draft.path, settings.ingest.shard_rows)
        draft.counts = settle(counts, draft.rows)
        if draft.rows == 0:
            raise UsageError(f"expected papers to keep, found none ({_told(draft.counts)}); the corpus stays as it was")
    log.info("corpus is ready", path=str(target), rows=draft.rows, **draft.counts)


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m services.ingest", description="PubMed to corpus.")
    parser.add_argument("--strict", action="store_true", help="stop at the first malformed XML file")
    parser.add_argument("--force", action="store_true", help="make the corpus again even when nothing changed")
    arguments = parser.parse_args()
    # SIGTERM unwinds like Ctrl-C, so that the draft is removed; as a container's first process it would be ignored.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def work(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
        ingest(settings, log, strict=arguments.strict or settings.ingest.strict, force=arguments.force)

    return run("ingest", work)


if __name__ == "__main__":
    raise SystemExit(main())
