"""How close many attempts at once come to the time of their longest chain.

Run from the repository's root: `PYTHONPATH=. python tests/attempts_benchmark.py --concurrency 1 8 64 160`.

A server in a process of its own answers every solver request after `--delay` seconds and every search at once. An
attempt is two turns with a search between them, so a chain of attempts that follow each other on one place takes
2·delay for each. Prints per concurrency: wall time, time of the longest chain, time of all attempts one by one, and
what the server saw.
"""

import argparse
import asyncio
import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

from model_services import Fault, Reply, chat_reply, search_reply, slowly, watched

from services.trainer.attempts import Attempts
from services.trainer.conversations import Conversations
from shared.clients import SearchClient, SolverClient
from shared.settings import Settings, changed

TURNS = 2
CALL = '<tool_call>{"name": "search", "arguments": {"query_list": ["metformin AMPK"]}}</tool_call>'
HEADER = (
    f"{'concurrency':>11} {'wall s':>8} {'chain s':>8} {'sum s':>8} {'wall/chain':>10} {'peak':>5} {'connections':>11}"
)


class Words:
    """A tokenizer for which a word is a token."""

    def count(self, text: str) -> int:
        return len(text.split())

    def cut(self, text: str, tokens: int) -> str:
        return " ".join(text.split()[:tokens])


def serve(pipe: Connection, delay: float) -> None:
    """Both services until the pipe is read; sends the address first and its counts last."""

    def answer(path: str, body: dict[str, Any]) -> Reply | Fault:
        if path == "/search":
            return search_reply(body["queries"], "7", "Metformin activates AMPK in the liver. " * 30)
        searched = body["messages"][-1]["role"] == "tool"
        return slowly(chat_reply("<answer>AMPK</answer>" if searched else CALL), delay)

    with watched(answer) as service:
        pipe.send(service.url)
        pipe.recv()
        pipe.send((service.peak, service.connections))


async def attempt_all(url: str, *, questions: int, attempts: int, concurrency: int) -> float:
    """Seconds that all attempts at all questions take."""
    limits = {"concurrency": concurrency, "attempt_deadline_s": 3600, "question_deadline_s": 3600}
    settings = changed(Settings(), {f"trainer.reward.{name}": value for name, value in limits.items()})
    async with (
        SolverClient(url, patience_s=60, connections=concurrency) as solver,
        SearchClient(url, patience_s=60, connections=concurrency) as search,
    ):
        runner = Attempts(Conversations(solver, search, Words()), settings)
        started = time.perf_counter()
        answered = await asyncio.gather(*[runner.answer(f"Question {n}?", range(attempts)) for n in range(questions)])
        seconds = time.perf_counter() - started
    lost = [one.problem for question in answered for one in question if one.ended != "answered"]
    if lost:
        raise SystemExit(f"expected every attempt to be answered, {len(lost)} were not: {lost[0]}")
    return seconds


def measure(concurrency: int, *, questions: int, attempts: int, delay: float) -> str:
    """One row of the table."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, delay), daemon=True)
    server.start()
    wall = asyncio.run(attempt_all(ours.recv(), questions=questions, attempts=attempts, concurrency=concurrency))
    ours.send("done")
    peak, connections = ours.recv()
    server.join()
    count = questions * attempts
    chain, total = -(-count // concurrency) * TURNS * delay, count * TURNS * delay
    return (
        f"{concurrency:>11} {wall:>8.2f} {chain:>8.2f} {total:>8.2f} {wall / chain:>10.2f} {peak:>5} {connections:>11}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--attempts", type=int, default=5)
    parser.add_argument("--delay", type=float, default=0.2, help="seconds of one solver reply")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64])
    args = parser.parse_args()
    print(HEADER)
    for concurrency in args.concurrency:
        row = measure(concurrency, questions=args.questions, attempts=args.attempts, delay=args.delay)
        print(row, flush=True)


if __name__ == "__main__":
    main()
