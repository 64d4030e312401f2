"""Speed and memory of reading PubMed XML: `PYTHONPATH=. .venv/bin/python tests/ingest_benchmark.py [folder]`.

In: a folder of `.xml.gz` files (default: the full records beside this checkout). Out, in one run: records a second of
bare lxml, of ours with every field in a Paper, and of pubmed_parser on one core, in CPU seconds, so that neighbours on
the machine do not count; the same of ours with 1 and 2 processes, in seconds of the clock; and the largest process for
1 and for 30 files. Each measurement has a process of its own.
"""

import gc
import logging
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from operator import add
from pathlib import Path
from typing import TypeVar

import pubmed_parser
import structlog
from isal import igzip
from lxml import etree

from services.ingest.folder import XmlFolder, opened
from services.ingest.pubmed_xml import Record, read_records
from services.ingest.store import Base
from shared.settings import IngestSettings, Settings

DEFAULT = Path(__file__).parents[2] / "shared" / "data" / "pubmed" / "full-xml"
SECONDS = 3.0  # each speed is measured over at least so long
ROUNDS = 3  # the best counts: all else is the neighbours'
COUNTS: dict[Path, int] = {}  # records of each file, known before anything is measured
T = TypeVar("T")


def bare(path: Path) -> int:
    """lxml alone: every record built as a tree and thrown away."""
    number = 0
    with igzip.open(path) as stream:  # type: ignore[no-untyped-call] # isal is typed by half
        for _, element in etree.iterparse(stream, events=("end",), tag="PubmedArticle"):
            element.clear()
            number += 1
    return number


def scan(path: Path) -> int:
    """Our first pass: PMIDs only, every byte checked."""
    with opened(path) as stream:
        return sum(1 for _ in read_records(stream))


def one_pass(path: Path) -> int:
    """Ours as the replies of Entrez are read: every byte checked and every field in a Paper."""
    with opened(path) as stream:
        return sum(bool(item.paper().pmid) for item in read_records(stream) if isinstance(item, Record))


def second_pass(path: Path) -> int:
    """Ours as a file is read that the first pass has checked: every field in a Paper."""
    with opened(path) as stream:
        records = read_records(stream, checked=True)
        return sum(bool(item.paper().pmid) for item in records if isinstance(item, Record))


def other(path: Path) -> int:
    """pubmed_parser with the options that come nearest to our fields."""
    found = pubmed_parser.parse_medline_xml(str(path), year_info_only=False, parse_downto_mesh_subterms=True)
    return sum(1 for _ in found)


def speed(read: Callable[[Path], int]) -> float:
    """Records per CPU second."""
    gc.freeze()
    gc.disable()  # as in the worker processes; for all readers alike, of which none makes cycles of records
    done, started = 0, time.process_time()
    while time.process_time() - started < SECONDS:
        done += sum(read(path) for path in COUNTS)
    return done / (time.process_time() - started)


def ingested(folder: Path, processes: int) -> tuple[float, int, float]:
    """Records per second of the clock through both passes, the largest process in KiB, and the parent's CPU share."""
    settings = Settings(ingest=IngestSettings(xml_dir=folder, workers=processes))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as draft:
        change = XmlFolder(settings, strict=True).change(Base(), Path(draft))
        number = sum(1 for _ in change.papers)
    seconds = time.perf_counter() - started
    parent, workers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    share = parent.ru_utime / (parent.ru_utime + workers.ru_utime)
    return number / seconds, max(parent.ru_maxrss, workers.ru_maxrss), share


def loops(processes: int) -> float:
    """Empty loops per second in so many processes: what the machine has to give at this moment."""
    context = get_context("fork")
    running = [context.Process(target=lambda: sum(range(50_000_000))) for _ in range(processes)]
    started = time.perf_counter()
    for process in running:
        process.start()
    for process in running:
        process.join()
    return processes / (time.perf_counter() - started)


def alone(work: Callable[..., T], *arguments: object) -> T:
    """The result of work in a process of its own; EOFError when it ends without one."""
    context = get_context("fork")
    results, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(work(*arguments)))
    process.start()
    sender.close()  # so that only the process holds it
    result: T = results.recv()
    process.join()
    return result


def copies(source: Path, folder: Path, number: int) -> None:
    """The first file under `number` names, each with PMIDs of its own, so that all records stand."""
    with opened(source) as stream:
        content = stream.read()
    for copy in range(number):
        between = re.split(rb"(?<=>)\d+(?=</PMID>)", content)
        numbers = (b"%d" % number for number in range(copy * 1_000_000 + 1, (copy + 1) * 1_000_000))
        changed = between[0] + b"".join(map(add, numbers, between[1:]))
        with igzip.open(folder / f"copy{copy:04d}.xml.gz", "wb") as out:  # type: ignore[no-untyped-call] # half typed
            out.write(changed)


def main() -> None:
    """Print all measurements; one line each."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    sources = sorted(Path(sys.argv[1] if len(sys.argv) > 1 else DEFAULT).glob("*.xml.gz"))
    if not sources:
        raise SystemExit("expected a folder of .xml.gz files, found none; name one")
    COUNTS.update({path: scan(path) for path in sources})
    print(
        f"{sum(COUNTS.values())} records in {len(sources)} files, best of {ROUNDS} rounds of {SECONDS:.0f} CPU s each"
    )
    readers = {"lxml": bare, "pubmed_parser": other, "scan": scan, "one pass": one_pass, "second pass": second_pass}
    found: dict[str, float] = dict.fromkeys(readers, 0.0)
    for _ in range(ROUNDS):
        for name, read in readers.items():
            found[name] = max(found[name], alone(speed, read))
    for name, rate in found.items():
        against = f"{rate / found['lxml']:.2f} of lxml, {rate / found['pubmed_parser']:.2f} x pubmed_parser"
        print(f"{name:14} {rate:8.0f} records per CPU second: {against}")
    with tempfile.TemporaryDirectory() as place:
        few, many = Path(place) / "few", Path(place) / "many"
        few.mkdir()
        many.mkdir()
        copies(sources[0], few, 1)
        copies(sources[0], many, 30)
        one, two = alone(ingested, many, 1), alone(ingested, many, 2)
        print(
            f"ingest, both passes: {one[0]:.0f} records/s with 1 process, {two[0]:.0f} with 2: {two[0] / one[0]:.2f} x"
        )
        print(f"(empty loops: {loops(2) / loops(1):.2f} x; the undivided parent: {one[2]:.0%} of CPU time)")
        small, large = alone(ingested, few, 1)[1], one[1]
        print(f"largest process: {small // 1024} MiB for 1 file, {large // 1024} MiB for 30 ({large / small:.2f} x)")


if __name__ == "__main__":
    main()
