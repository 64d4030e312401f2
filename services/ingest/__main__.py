"""PubMed to corpus: `python -m services.ingest`.

In: the settings of `DRZERO_INGEST__*`, or the flags that stand for some of them; the source is a folder of PubMed XML,
an Entrez query or the shipped demo records. Out: `<data_dir>/corpus` (shards and a manifest with the fate of every
record). A corpus that was made from the same input by the same settings is reused; one that lacks only what is new
since is added to; an interrupted fetch goes on where it was. On an error or interruption the corpus of before stays as
it was.
Exit status: 0 done or reused, 1 a known error, 2 wrong settings, 130 interrupted.
"""

import argparse
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import structlog

from services.ingest.estimate import Estimate
from services.ingest.filters import Rules
from services.ingest.store import Base, Change, write
from shared.command import UsageError, run
from shared.corpus import Corpus
from shared.files import ArtifactError, publish, read_manifest, require_free_space, stale_reason
from shared.settings import IngestSettings, Settings

FLAGS = {
    "query": "DRZERO_INGEST__QUERY",
    "from": "DRZERO_INGEST__DATE_FROM",
    "to": "DRZERO_INGEST__DATE_TO",
    "max": "DRZERO_INGEST__MAX_RECORDS",
    "xml_dir": "DRZERO_INGEST__XML_DIR",
}


class Source(Protocol):
    """Where papers come from. `made_from` and `shaped_by` go into the manifest.

    A corpus whose settings differ from these only in `may_differ` can be gone on from.
    """

    made_from: Mapping[str, str]
    shaped_by: Mapping[str, Any]
    may_differ: frozenset[str]

    def goes_on_from(self, base: Base) -> bool:
        """Whether this corpus can be gone on from, as far as its origin says."""

    def change(self, base: Base, draft: Path) -> Change:
        """What is new since the base, in corpus order; files put into `draft` become part of the artifact."""

    def estimate(self, base: Base) -> Estimate:
        """What a run that goes on from the base will take; reads sizes and counts only."""

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
    rules = Rules.of(settings.ingest)
    shaped_by = {"source": name, "shard_rows": settings.ingest.shard_rows, **rules.shape, **source.shaped_by}
    reason = stale_reason(target, settings=shaped_by, made_from=source.made_from)
    anew = arguments.force or (strict and has_malformed(target))  # which is not what --strict promises
    base = Base() if anew else base_of(target, source, shaped_by)
    if arguments.dry_run:
        log.info("dry run: nothing is fetched or written", source=name, why=reason, **source.estimate(base).told())
        return
    if arguments.fresh:
        source.done()
    if reason is None and not anew and not arguments.update:
        manifest = read_manifest(target)
        log.info("corpus is reused", path=str(target), rows=manifest.rows, **manifest.counts)
        source.done()  # a kill between publishing and this line leaves kept replies behind
        return
    why = reason or ("--update" if arguments.update else "--force, or --strict with malformed files")
    log.info("corpus is made", source=name, path=str(target), why=why, goes_on_from=len(base.ledger))
    require_free_space(settings.storage.data_dir, settings.storage.min_free_gb)
    with publish(target, settings=shaped_by, made_from=source.made_from) as draft:
        change = source.change(base, draft.path)
        if reason is None and not anew and change.is_nothing:
            draft.discard = True  # a new version, if only of the day, would make all that follows from it anew
            log.info("corpus is up to date", path=str(target), **change.counts)
            source.done()
            return
        write(change, base, draft, rules=rules, shard_rows=settings.ingest.shard_rows)
        if draft.rows == 0:
            raise UsageError(f"expected papers to keep, found none ({_told(draft.counts)}); the corpus stays as it was")
    source.done()
    log.info("corpus is ready", path=str(target), rows=draft.rows, **draft.counts)


def has_malformed(target: Path) -> bool:
    """Whether files were left out of the corpus as malformed; False when there is no corpus."""
    try:
        return bool(read_manifest(target).counts.get("files_malformed"))
    except ArtifactError:
        return False


def base_of(target: Path, source: Source, shaped_by: Mapping[str, Any]) -> Base:
    """The published corpus if the source can go on from it, else an empty one."""
    try:
        manifest = read_manifest(target)
    except ArtifactError:
        return Base()
    wanted = json.loads(json.dumps(shaped_by, default=str))
    differing = {key for key in {*wanted, *manifest.settings} if wanted.get(key) != manifest.settings.get(key)}
    if differing - source.may_differ:
        return Base()
    base = Base.read(target, manifest)
    return base if source.goes_on_from(base) else Base()


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
    parser.add_argument("--update", action="store_true", help="ask PubMed what is new since the corpus was made")
    parser.add_argument("--force", action="store_true", help="make the corpus again, from nothing")
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
