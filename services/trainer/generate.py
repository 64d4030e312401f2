"""Questions by a trained proposer: `python -m services.trainer.generate --pmid 123` or `--topic "sepsis biomarkers"`.

The proposer of the newest round, or of `--round`, is served on :8001 for the time that it takes and writes as in the
stage `questions`, about one paper of the corpus or about papers that the search service finds. Then :8001 serves again
what it served before, also after an error or an interruption, which waits for that. A training that ran meanwhile
would meet the wrong weights, so a run that is driven is a refusal, and none can go on while this lasts. One JSON line
per question, or text with `--text`. Draws are seeded by the run's seed: the same command asks for the same questions.
"""

import argparse
import asyncio
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import structlog

from services.trainer.ask import PATIENCE_S, checked_question
from services.trainer.candidates import deadline, hold, proposer_manner, services
from services.trainer.conversations import Conversations
from services.trainer.fitting import fit_prompts, prompt_of
from services.trainer.journal import Row
from services.trainer.paths import run_paths
from services.trainer.publish import published_round
from services.trainer.questions import Candidate, read_candidate
from services.trainer.reward import attempt_seeds
from services.trainer.rounds import proposer_settings
from services.trainer.serving import load_at, serve, served_by
from services.trainer.storage import driven
from shared.balance import addresses_in
from shared.clients import SearchClient, ServiceError, SolverClient
from shared.command import UsageError, counted, plain, run
from shared.corpus import Corpus
from shared.files import write_atomically
from shared.records import Paper, Seed
from shared.serving import checked_weights, note_path
from shared.settings import Settings

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MOST_HOPS = 4  # as in trainer.hop_ratio
MOST_COUNT = 1000
MOST_ROUND = 10_000


def main(given: argparse.Namespace, settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Write the questions and print them."""
    number = published_round(settings, "proposer", given.round)
    own = proposer_settings(settings, number)
    with no_training(settings):
        seeds = seeds_of(papers_wanted(given, own), given.hops, own)
        log.info("questions are written", round=number, papers=[seed.pmid for seed in seeds], hops=given.hops)
        with lent(own, run_paths(own).weights, log):
            found = asyncio.run(write_questions(seeds, given.count, own))
            for one in found:
                print(as_text(one) if given.text else json.dumps(as_row(one)), flush=True)
    if len(found) < given.count:
        tries = own.trainer.questions.candidates
        raise UsageError(
            f"expected {given.count} well-formed questions, the proposer of round {number} wrote {len(found)} in "
            f"{given.count * tries} tries; try other papers or fewer hops, or train it for longer"
        )


# --- papers


def papers_wanted(given: argparse.Namespace, settings: Settings) -> list[Paper]:
    """The papers that the questions are about, at most as many as questions; UsageError when there are none."""
    if given.pmid is None:
        topic = checked_question(given.topic, settings, "topic")
        papers = asyncio.run(papers_about(topic, min(given.count, settings.retrieval.top_k_max), settings))
        if not papers:
            raise UsageError(f"expected papers about {topic!r}, the search finds none; try other words")
        return papers
    asyncio.run(require_search(settings))
    paper = Corpus(run_paths(settings).corpus).find(given.pmid.strip())
    if paper is None:
        raise UsageError(
            f"expected PMID {given.pmid!r} in the corpus, which has no such paper; ingest it or try another"
        )
    return [paper]


async def papers_about(topic: str, count: int, settings: Settings) -> list[Paper]:
    """The best papers that the search service finds."""
    async with SearchClient(settings.retrieval.url, patience_s=PATIENCE_S) as search:
        (hits,) = await search.search([topic], count)
    return [hit.paper for hit in hits]


async def require_search(settings: Settings) -> None:
    """Raise ServiceError when the search service is away; a proposer that searches would wait for it for long."""
    async with SearchClient(settings.retrieval.url, patience_s=PATIENCE_S) as search:
        await search.call("GET", "/ready")


def seeds_of(papers: Sequence[Paper], hops: int, settings: Settings) -> list[Seed]:
    """The papers as seeds whose prompt fits."""
    seeds = [Seed(index, paper.pmid, hops, paper.contents) for index, paper in enumerate(papers)]
    fitted = fit_prompts(seeds, trainer=settings.trainer, model=str(run_paths(settings).weights))
    return [one.seed for one in fitted]


# --- questions


async def write_questions(seeds: Sequence[Seed], count: int, settings: Settings) -> list[Candidate]:
    """Up to `count` well-formed questions, spread over the seeds; a malformed one is replaced by a further draw.

    At most `questions.candidates` conversations are held per wanted question.
    """
    most = count * settings.trainer.questions.candidates
    found: list[Candidate] = []
    held = 0
    places = asyncio.Semaphore(settings.trainer.reward.concurrency)
    async with services(settings) as conversations:

        async def write(number: int) -> Candidate:
            async with places:
                row = await conversation(seeds[number % len(seeds)], number // len(seeds), conversations, settings)
                return read_candidate(row)

        while len(found) < count and held < most:
            wave = range(held, min(held + count - len(found), most))
            held = wave.stop
            found += [one for one in await asyncio.gather(*map(write, wave)) if one.sound]
    return found


async def conversation(seed: Seed, draw: int, conversations: Conversations, settings: Settings) -> Row:
    """One conversation about a seed, as `candidates.py` has them; `draw` tells those about one seed apart."""
    trainer = settings.trainer
    draws = attempt_seeds(trainer.seed, trainer.round, f"generate {seed.pmid} {seed.hop}", draw + 1)
    talk = conversations.begin(prompt_of(seed, trainer), seed=draws[draw], until=deadline(settings))
    await hold(conversations, talk, proposer_manner(settings, seed.hop))
    info = {"name": f"{seed.pmid}.{draw}", "pmid": seed.pmid, "hop": seed.hop, "document": seed.document}
    return {**info, "turns": talk.turns, "searches": talk.searches}


def as_row(one: Candidate) -> Row:
    """A question as it is printed."""
    return {"question": one.question, "answer": one.answer, "hop": one.hop, "pmid": one.pmid, "searches": one.hops}


def as_text(one: Candidate) -> str:
    """A question for people."""
    searches = [f"  searched {'; '.join(hop['queries'])}: PMID {', '.join(hop['pmids']) or 'none'}" for hop in one.hops]
    lines = [
        f"Question: {one.question}",
        f"Answer: {one.answer}",
        f"  {one.hop} {'hop' if one.hop == 1 else 'hops'} from PMID {one.pmid}",
        *searches,
    ]
    return plain("\n".join([*lines, ""]))


# --- the solver service


@contextmanager
def no_training(settings: Settings) -> Iterator[None]:
    """Keep the drivers of all runs away while the block runs; UsageError when one is alive."""
    with driven(settings, hold=True) as runs:
        if runs:
            raise UsageError(
                f"expected no training while the proposer is served, but another process drives the run "
                f"{', '.join(sorted(runs))}; wait for it or stop it"
            )
        yield


@contextmanager
def lent(settings: Settings, weights: Path, log: structlog.stdlib.BoundLogger) -> Iterator[None]:
    """Have every solver serve `weights` while the block runs, and then what it served before.

    Nothing is lent that could not be given back.
    """
    addresses = addresses_in(settings.solver.url)
    before = {address: checked_weights(asyncio.run(weights_at(address))) for address in addresses}
    note = note_path(settings)
    noted = note.read_text(encoding="utf-8") if note.is_file() else None
    try:
        serve(settings, str(weights), log)
        yield
    finally:
        with undisturbed():
            # The note first: a solver that is away at this moment comes back with the right weights.
            if noted is None:
                note.unlink(missing_ok=True)
            else:
                write_atomically(note, noted)
            give_back(before, settings.trainer.patience_s, log)


def give_back(before: Mapping[str, str], patience_s: float, log: structlog.stdlib.BoundLogger) -> None:
    """Have each address serve its weights again; the first error is raised when all have been tried."""
    errors: list[ServiceError] = []
    for address, weights in before.items():
        try:
            asyncio.run(load_at(address, weights, patience_s=patience_s))
            log.info("solver serves again what it did", solver=address, weights=weights)
        except ServiceError as error:
            log.warning("solver does not serve again what it did", solver=address, weights=weights)
            errors.append(error)
    if errors:
        raise errors[0]


@contextmanager
def undisturbed() -> Iterator[None]:
    """No signal that asks for an end is heard while the block runs."""
    heard = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)


async def weights_at(address: str) -> str:
    """What one solver serves."""
    async with SolverClient(address, patience_s=PATIENCE_S) as solver:
        return await served_by(solver)


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m services.trainer.generate", description="Write questions with a trained proposer."
    )
    about = parser.add_mutually_exclusive_group(required=True)
    about.add_argument("--pmid", help="a paper of the corpus")
    about.add_argument("--topic", help="what the search service is asked for papers about")
    parser.add_argument("--hops", type=partial(counted, most=MOST_HOPS), default=2, help="1 to 4, default 2")
    parser.add_argument("--count", type=partial(counted, most=MOST_COUNT), default=3, help="questions, default 3")
    parser.add_argument("--round", type=partial(counted, most=MOST_ROUND), help="the newest unless given")
    parser.add_argument("--text", action="store_true", help="print text for people instead of JSON lines")
    return parser.parse_args(words)


if __name__ == "__main__":
    wanted = parsed()
    for stop in STOPS:  # `kill` and a closed terminal must give the weights back too
        if signal.getsignal(stop) is not signal.SIG_IGN:  # as under nohup
            signal.signal(stop, signal.default_int_handler)
    raise SystemExit(run("trainer", partial(main, wanted)))
