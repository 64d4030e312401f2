"""What questions are made of: candidates that a proposer writes, and the solver's answers that verify them.

Over HTTP, with the model that :8001 serves at the moment: first the proposer, then the round's solver. Both go through
a journal. A service that stays away ends the stage; the same command goes on from the journal. A conversation that
takes longer than `trainer.rollout_deadline_s` ends as it is, as long as both services are there.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from services.trainer.attempts import ended_by, solver_manner
from services.trainer.conversations import Conversations, Manner, Talk
from services.trainer.journal import Row, journalled
from services.trainer.protocol import GUIDED_CALL, alone_messages
from services.trainer.reward import attempt_seeds
from services.trainer.tokens import Tokens
from shared.clients import SearchClient, ServiceError, SolverClient
from shared.model_files import resolve_model
from shared.progress import Progress
from shared.settings import Settings
from shared.transcript import last_tag


async def write_candidates(
    settings: Settings, seeds: Sequence[Row], file: Path, enough: Callable[[Sequence[Row]], bool]
) -> list[Row]:
    """`questions.candidates` conversations per seed row: seed, turns and searches of each.

    The seeds are taken in rounds of as many as are in flight at once; none follows when what there is is `enough`.
    """
    trainer = settings.trainer
    at_once, count = trainer.reward.concurrency, trainer.questions.candidates
    written: list[Row] = []
    with Progress("questions", settings, total=len(seeds) * count, unit="candidate") as progress:
        async with services(settings) as conversations:
            step = -(-at_once // count)
            for first in range(0, len(seeds), step):
                some = seeds[first : first + step]
                by_name = {f"{seed['extra_info']['index']}.{number}": seed for seed in some for number in range(count)}

                async def write(name: str, by_name: dict[str, Row] = by_name) -> Row:
                    return await write_candidate(settings, conversations, by_name[name], int(name.split(".")[1]))

                written += await journalled(file, list(by_name), write, at_once=at_once, progress=progress)
                if enough(written):
                    break
    return written


async def write_candidate(settings: Settings, conversations: Conversations, seed: Row, number: int) -> Row:
    """The proposer's conversation about a seed, the `number`th of several, with what it was asked."""
    trainer, info = settings.trainer, seed["extra_info"]
    draws = attempt_seeds(trainer.seed, trainer.round, info["pmid"], trainer.questions.candidates)
    talk = conversations.begin(list(seed["prompt"]), seed=draws[number], until=deadline(settings))
    await hold(conversations, talk, proposer_manner(settings, info["hop"]))
    asked = {key: info[key] for key in ("pmid", "hop", "document")}
    return {**asked, "turns": talk.turns, "searches": talk.searches}


async def check_candidates(settings: Settings, wanted: Sequence[Row], file: Path) -> list[Row]:
    """The solver's answers to each of `wanted` (name, question, evidence): `with_evidence` and `without`."""
    trainer, questions = settings.trainer, settings.trainer.questions
    by_name = {row["name"]: row for row in wanted}
    manner = replace(solver_manner(settings), max_turns=1, tool=False)
    async with services(settings) as conversations:

        async def answers(question: str, evidence: str) -> list[str]:
            found = []
            for draw in attempt_seeds(trainer.seed, trainer.round, question, questions.tries):
                messages = alone_messages(question, trainer.prompts, trainer.reward.worked_examples, evidence=evidence)
                talk = conversations.begin(messages, seed=draw, until=deadline(settings))
                await hold(conversations, talk, manner)
                found.append(last_answer(talk))
            return found

        async def check(name: str) -> Row:
            row = by_name[name]
            evidence = conversations.tokens.cut(row["evidence"], questions.evidence_tokens)
            return {
                "with_evidence": await answers(row["question"], evidence),
                "without": await answers(row["question"], ""),
            }

        with Progress("verification", settings, total=len(by_name), unit="candidate") as progress:
            at_once = trainer.reward.concurrency
            return await journalled(file, list(by_name), check, at_once=at_once, progress=progress)


async def hold(conversations: Conversations, talk: Talk, manner: Manner) -> str:
    """Hold a talk to its end and say why it ended: as `Conversations.hold`, or `deadline`.

    A talk that outgrows the context ends as it is, and so does one that is overdue when both services still work; any
    other failure of a service is raised.
    """
    try:
        return await conversations.hold(talk, manner)
    except ServiceError as error:
        ended = ended_by(error)
        if ended not in ("length", "deadline"):
            raise
    if ended == "deadline":
        await require_work(conversations, manner)
    return ended


async def require_work(conversations: Conversations, manner: Manner) -> None:
    """Raise ServiceError unless the model gives a token and the search an answer, each within its client's patience."""
    messages = [{"role": "user", "content": "?"}]
    await conversations.solver.chat({"model": manner.model, "messages": messages, "max_tokens": 1, "temperature": 0.0})
    await conversations.search.search(["?"], 1)


def last_answer(talk: Talk) -> str:
    """The last answer tag of a talk, or ""."""
    return last_tag("\n".join(talk.turns), "answer")


def proposer_manner(settings: Settings, hop: int) -> Manner:
    """How the proposer writes a question of `hop` hops: as in its training."""
    trainer = settings.trainer
    return Manner(
        role="proposer",
        model=settings.solver.served_name,
        context_tokens=settings.solver.context_tokens,
        max_turns=trainer.max_turns,
        max_new_tokens=trainer.turn_tokens,
        max_tool_tokens=trainer.max_tool_tokens,
        temperature=trainer.temperature,
        top_k=trainer.search_top_k,
        done=lambda _: False,  # it ends with a turn that does not search
        first_regex=GUIDED_CALL if trainer.guided_tool_call and hop > 1 else "",
    )


def deadline(settings: Settings) -> float:
    """The moment at which a conversation that begins now is given up, in time.monotonic()."""
    return time.monotonic() + settings.trainer.rollout_deadline_s


@asynccontextmanager
async def services(settings: Settings) -> AsyncIterator[Conversations]:
    """Clients of the solver and search services, with the tokenizer of the model that is served."""
    patience, connections = settings.trainer.patience_s, settings.trainer.reward.concurrency
    async with (
        SolverClient(settings.solver.url, patience_s=patience, connections=connections) as solver,
        SearchClient(settings.retrieval.url, patience_s=patience, connections=connections) as search,
    ):
        yield Conversations(solver, search, Tokens(resolve_model(settings.solver.model, settings)))
