"""The load test of the search service: `PYTHONPATH=. python tests/retrieval_load.py`, on loopback, bounded in time.

In: a built index under the settings of the environment (DRZERO_STORAGE__DATA_DIR), queries made from its titles. Starts
the service on a free port; --clients connections ask one query each at a time for --seconds. Every answer's PMIDs are
compared with the library's. Out: queries/s, p50, p95, p99.
--compare  the same in slices that alternate with the library in batches of 64 and with a plain server (torch, FAISS
           flat, one request at a time), and the ratios
--one      latency of one client alone beside the bare library call
--overload ten times as many clients as the queue has room for: statuses, and how soon all is well again
--soak N   so many requests: the memory of the service at the start and at the end
Exit status 1 when an answer is wrong or missing.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from services.retrieval.search import Searcher
from shared.corpus import Corpus
from shared.settings import Settings, load_settings

BATCH = 64
TOP_K = 3
QUERIES = 3000
WORDS = 14  # of a title; questions of people and models are about as long
FULL = 10  # clients per place in the queue when it is to be too full

Pmids = tuple[bytes, ...]


class Asked(NamedTuple):
    """The queries in order, and the PMIDs that each must find."""

    bodies: Sequence[bytes]
    expected: Sequence[Pmids]


@dataclass
class Seen:
    """What the clients of one slice saw."""

    seconds: float = 0.0
    waits: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    beside_s: list[float] = field(default_factory=list)  # bare calls made in turn with the requests

    def note(self, status: int, wait: float, *, right: bool) -> None:
        """Count one reply."""
        self.waits.append(wait)
        self.statuses[status] += 1
        self.wrong += status == 200 and not right

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.statuses[200] / self.seconds

    def quantile(self, share: float) -> float:
        """Milliseconds within which this share of the requests was answered."""
        return sorted(self.waits)[min(len(self.waits) - 1, int(share * len(self.waits)))] * 1000

    def line(self, name: str) -> str:
        """A row of the table."""
        quantiles = " ".join(f"p{share * 100:.0f} {self.quantile(share):7.1f} ms" for share in (0.5, 0.95, 0.99))
        return f"{name:10} {self.rate:7.1f} queries/s  {quantiles}  {dict(self.statuses)}  wrong {self.wrong}"


# ---- the client ------------------------------------------------------------------------------------------------------


class Wire:
    """One kept-alive connection; as little work as possible, since it runs on the cores of the service."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def ask(self, path: bytes, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of the reply to a POST, or to a GET when there is no body."""
        kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body) if body else b""
        self._writer.write(b"%b %b HTTP/1.1\r\nHost: x\r\n%b\r\n%b" % (b"POST" if body else b"GET", path, kind, body))
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return int(head[9:12]), await self._reader.readexactly(length)


@asynccontextmanager
async def wires(port: int, count: int) -> AsyncIterator[list[Wire]]:
    """So many open connections."""
    opened = [await asyncio.open_connection("127.0.0.1", port, limit=1 << 20) for _ in range(count)]
    try:
        yield [Wire(*pair) for pair in opened]
    finally:
        for _, writer in opened:
            writer.close()


def pmids_in(body: bytes) -> Pmids:
    """The PMIDs of a reply, in order; quotes inside of texts are escaped, so this finds keys only."""
    return tuple(piece[: piece.index(b'"')] for piece in body.split(b'"pmid":"')[1:])


async def slice_of(wire: Sequence[Wire], asked: Asked, more: Callable[[], bool]) -> Seen:
    """Every connection asks one query after the other while there is `more` to ask."""
    seen, numbers = Seen(), itertools.count()
    started = time.perf_counter()

    async def client(own: Wire) -> None:
        while more():
            number = next(numbers) % len(asked.bodies)
            before = time.perf_counter()
            status, body = await own.ask(b"/search", asked.bodies[number])
            seen.note(status, time.perf_counter() - before, right=pmids_in(body) == asked.expected[number])

    await asyncio.gather(*(client(own) for own in wire))
    seen.seconds = time.perf_counter() - started
    return seen


async def loaded(port: int, asked: Asked, clients: int, seconds: float) -> Seen:
    """A slice of so many seconds."""
    async with wires(port, clients) as opened:
        end = time.perf_counter() + seconds
        return await slice_of(opened, asked, lambda: time.perf_counter() < end)


def together(slices: Sequence[Seen]) -> Seen:
    """Several slices as one."""
    return Seen(
        seconds=sum(seen.seconds for seen in slices),
        waits=[wait for seen in slices for wait in seen.waits],
        statuses=sum((seen.statuses for seen in slices), Counter()),
        wrong=sum(seen.wrong for seen in slices),
    )


# ---- what is measured ------------------------------------------------------------------------------------------------


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def service(**more: str) -> Iterator[tuple[int, int]]:
    """Our service as a process; yields its port and process id once it is ready."""
    port = free_port()
    environ = os.environ | {"DRZERO_RETRIEVAL__PORT": str(port), "DRZERO_LOG__LEVEL": "warning", **more}
    with subprocess.Popen([sys.executable, "-m", "services.retrieval"], env=environ) as process:
        try:
            asyncio.run(until_ready(port, process))
            yield port, process.pid
        finally:
            process.terminate()


async def until_ready(port: int, process: "subprocess.Popen[bytes]") -> None:
    """Wait until /ready says so."""
    async with asyncio.timeout(120):
        while process.poll() is None:
            try:
                async with wires(port, 1) as (wire,):
                    if (await wire.ask(b"/ready"))[0] == 200:
                        return
            except OSError:
                pass  # it does not listen yet
            await asyncio.sleep(0.05)
    raise SystemExit(f"the service ended with status {process.returncode} before it was ready")


def library(pipe: Connection, settings: Settings) -> None:
    """The library in a process of its own: does what it is told until the pipe is closed.

    ("answers", texts) → PMIDs of each; ("alone", text) → seconds of one call; ("batches", texts, seconds) → queries/s.
    """
    searcher = Searcher(settings)
    while True:
        what, *told = pipe.recv()
        if what == "answers":
            batches = (told[0][at : at + BATCH] for at in range(0, len(told[0]), BATCH))
            found = [hits for batch in batches for hits in searcher.search(batch, TOP_K)]
            pipe.send([[hit.paper.pmid for hit in hits] for hits in found])
        elif what == "alone":
            started = time.perf_counter()
            searcher.search([told[0]], TOP_K)
            pipe.send(time.perf_counter() - started)
        else:
            pipe.send(rate_of(searcher, *told))


def rate_of(searcher: Searcher, texts: Sequence[str], seconds: float) -> float:
    """Queries a second in batches of 64."""
    started = time.perf_counter()
    for batches in itertools.count(1):
        at = (batches - 1) * BATCH % max(1, len(texts) - BATCH + 1)
        searcher.search(texts[at : at + BATCH], TOP_K)
        if time.perf_counter() - started > seconds:
            break
    return batches * min(BATCH, len(texts)) / (time.perf_counter() - started)


def plain_server(pipe: Connection, settings: Settings) -> None:
    """The plainest server: sentence encoder in torch, FAISS flat, one request at a time in the event loop."""
    import faiss
    import numpy as np
    import torch
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from transformers import AutoModel, AutoTokenizer

    from shared.model_files import resolve_model

    folder = resolve_model(settings.retrieval.encoder.model, settings)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    vectors = np.load(settings.storage.data_dir / "index" / "vectors.npy")
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    corpus = Corpus(settings.storage.data_dir / "corpus")
    papers: dict[int, dict[str, Any]] = dict(enumerate(paper.as_record() for paper in corpus))
    app = FastAPI()

    @app.post("/search")
    async def search(request: Request) -> JSONResponse:
        asked = await request.json()
        with torch.inference_mode():
            tokens = tokenizer(asked["queries"], padding=True, truncation=True, max_length=256, return_tensors="pt")
            mask = tokens["attention_mask"].unsqueeze(-1)
            pooled = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
            unit = torch.nn.functional.normalize(pooled).numpy()
        scores, rows = index.search(unit, asked["top_k"])
        hits = [
            [{"document": papers[int(row)], "score": float(score)} for row, score in zip(*pair, strict=True)]
            for pair in zip(rows, scores, strict=True)
        ]
        return JSONResponse({"results": [{"hits": one} for one in hits]})

    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    pipe.send(int(listener.getsockname()[1]))
    uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run(sockets=[listener])


@contextmanager
def child(work: Callable[[Connection, Settings], None], settings: Settings) -> Iterator[Connection]:
    """A function in a process of its own, and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, settings), daemon=True)
    process.start()
    try:
        yield here
    finally:
        process.kill()
        process.join()


# ---- the tests -------------------------------------------------------------------------------------------------------


def texts_of(settings: Settings) -> list[str]:
    """Queries made from titles, all different, spread over the corpus."""
    corpus = Corpus(settings.storage.data_dir / "corpus")
    step = max(1, len(corpus) // QUERIES)
    titles = (paper.title for paper in itertools.islice(corpus, 0, None, step))
    return list(dict.fromkeys(text for title in titles if (text := " ".join(title.split()[:WORDS]))))


def told(pipe: Connection, *question: Any) -> Any:
    """The child's answer."""
    pipe.send(question)
    return pipe.recv()


def ask_all(texts: Sequence[str], pipe: Connection) -> Asked:
    """Requests of one query each, and what the library finds."""
    bodies = [json.dumps({"queries": [text], "top_k": TOP_K}).encode() for text in texts]
    return Asked(bodies, [tuple(pmid.encode() for pmid in pmids) for pmids in told(pipe, "answers", texts)])


def compare(options: argparse.Namespace, texts: list[str], pipe: Connection, settings: Settings) -> int:
    """Slices of the plain server, the library and the service in turn."""
    asked = ask_all(texts, pipe)
    plain, offline, ours = [], [], []
    with child(plain_server, settings) as rival, service() as (port, _):
        rival_port = rival.recv()
        asyncio.run(loaded(port, asked, options.clients, 2))
        for _ in range(options.rounds):
            plain.append(asyncio.run(loaded(rival_port, asked, options.clients, options.seconds)))
            offline.append(told(pipe, "batches", texts, options.seconds))
            ours.append(asyncio.run(loaded(port, asked, options.clients, options.seconds)))
    seen, rival_seen, rate = together(ours), together(plain), statistics.median(offline)
    rival_seen.wrong = 0  # it searches by vectors alone
    print(rival_seen.line("plain"))
    print(f"{'library':10} {rate:7.1f} queries/s in batches of {BATCH}")
    print(seen.line("service"))
    by_round = [
        (one.rate / other.rate, one.rate / alone) for one, other, alone in zip(ours, plain, offline, strict=True)
    ]
    for name, ratios in zip(("plain", "library"), zip(*by_round, strict=True), strict=True):
        print(f"service / {name}: median {statistics.median(ratios):.2f} of {[round(ratio, 2) for ratio in ratios]}")
    print(f"p99 / p50: {seen.quantile(0.99) / seen.quantile(0.5):.2f}")
    return failures(seen)


async def in_turn(port: int, asked: Asked, texts: Sequence[str], pipe: Connection, seconds: float) -> Seen:
    """One client's request, the bare call of the same query, and again; `beside_s` has the calls."""
    seen, end = Seen(), time.perf_counter() + seconds
    async with wires(port, 1) as (wire,):
        for number in itertools.cycle(range(len(texts))):
            before = time.perf_counter()
            status, body = await wire.ask(b"/search", asked.bodies[number])
            seen.note(status, time.perf_counter() - before, right=pmids_in(body) == asked.expected[number])
            seen.beside_s.append(told(pipe, "alone", texts[number]))
            if time.perf_counter() > end:
                return seen
    raise AssertionError("cycle() does not end")


def one(options: argparse.Namespace, texts: list[str], pipe: Connection) -> int:
    """One client alone, and the bare call, in turn."""
    asked = ask_all(texts, pipe)
    with service() as (port, _):
        asyncio.run(in_turn(port, asked, texts, pipe, 1))
        seen = asyncio.run(in_turn(port, asked, texts, pipe, options.seconds * options.rounds))
    call, request = statistics.median(seen.beside_s) * 1000, seen.quantile(0.5)
    more = statistics.median(wait - call for wait, call in zip(seen.waits, seen.beside_s, strict=True)) * 1000
    print(f"bare call {call:.2f} ms, request {request:.2f} ms, allowed {1.1 * call + 1:.2f} ms; median of differences")
    print(f"{more:.2f} ms over {len(seen.waits)} pairs, wrong {seen.wrong}, {dict(seen.statuses)}")
    return failures(seen)


def overload(options: argparse.Namespace, texts: list[str], pipe: Connection) -> int:
    """Far more clients than the queue takes, then one."""
    asked = ask_all(texts, pipe)
    with service(DRZERO_RETRIEVAL__QUEUE_QUERIES=str(options.clients)) as (port, _):
        usual = asyncio.run(loaded(port, asked, options.clients, options.seconds))
        seen = asyncio.run(loaded(port, asked, FULL * options.clients, options.seconds))
        ended = time.perf_counter()
        after = asyncio.run(loaded(port, asked, 1, 0.01))
        back_s = time.perf_counter() - ended
        again = asyncio.run(loaded(port, asked, options.clients, options.seconds))
    for name, one in (("before", usual), ("overload", seen), ("first", after), ("after", again)):
        print(one.line(name))
    print(f"answered again {back_s:.3f} s after the end of the overload")
    others = sum(count for status, count in seen.statuses.items() if status not in (200, 503))
    return failures(usual, after, again) or int(bool(others or seen.wrong or back_s > 1))


def soak(options: argparse.Namespace, texts: list[str], pipe: Connection) -> int:
    """So many requests, with the memory of the service."""
    asked, left = ask_all(texts, pipe), options.soak

    def more() -> bool:
        nonlocal left
        left -= 1
        return bool(left >= 0)

    async def ask() -> Seen:
        async with wires(port, options.clients) as opened:
            return await slice_of(opened, asked, more)

    with service() as (port, process):
        asyncio.run(loaded(port, asked, options.clients, options.seconds))
        before = resident_mb(process)
        seen = asyncio.run(ask())
        print(seen.line("soak"))
        print(f"resident memory {before:.0f} MB, {resident_mb(process):.0f} MB after {options.soak} requests")
    return failures(seen)


def load(options: argparse.Namespace, texts: list[str], pipe: Connection) -> int:
    """One slice."""
    asked = ask_all(texts, pipe)
    with service() as (port, _):
        asyncio.run(loaded(port, asked, options.clients, 1))
        seen = asyncio.run(loaded(port, asked, options.clients, options.seconds))
    print(seen.line("service"))
    return failures(seen)


def resident_mb(process: int) -> float:
    """Memory of a process, in MB."""
    with open(f"/proc/{process}/status") as lines:  # noqa: PTH123 -- no file
        return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS"))


def failures(*slices: Seen) -> int:
    """Exit status: 1 when an answer was wrong or none."""
    return int(any(seen.wrong or set(seen.statuses) - {200} for seen in slices))


def main() -> int:
    """Run the test that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one slice")
    parser.add_argument("--rounds", type=int, default=5, help="of slices that alternate")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--one", action="store_true")
    parser.add_argument("--overload", action="store_true")
    parser.add_argument("--soak", type=int, default=0, metavar="N")
    options = parser.parse_args()
    settings = load_settings()
    texts = texts_of(settings)
    with child(library, settings) as pipe:
        if options.compare:
            return compare(options, texts, pipe, settings)
        if options.one:
            return one(options, texts, pipe)
        if options.overload:
            return overload(options, texts, pipe)
        return soak(options, texts, pipe) if options.soak else load(options, texts, pipe)


if __name__ == "__main__":
    raise SystemExit(main())
