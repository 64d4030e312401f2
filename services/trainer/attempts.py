"""The solver's attempts at a question: several conversations over HTTP, at once, with bounded concurrency.

A service that fails costs the attempt: it comes back lost (`Attempt.lost`), neither right nor wrong, and no
ServiceError leaves this file. An attempt's deadline starts when it gets its place; the time before counts against the
deadline of the question alone. The answer is the last answer tag of a turn that the model itself wrote.
"""

import asyncio
import re
import time
from collections.abc import Sequence

from services.trainer.conversations import Conversations, Manner
from services.trainer.protocol import solver_messages
from shared.clients import Overdue, Refused, ServiceError
from shared.records import Attempt
from shared.settings import Settings
from shared.transcript import last_tag

OVER_CONTEXT = re.compile(r" 400: .*(context length|the context of \d)", re.DOTALL)  # SGLang's words and our server's
ENDED = {"length": "length", "open": "no_answer"}  # a conversation without an answer


def solver_manner(settings: Settings) -> Manner:
    """How the solver answers, in its attempts and elsewhere."""
    reward = settings.trainer.reward
    return Manner(
        role="solver",
        model=settings.solver.served_name,
        context_tokens=settings.solver.context_tokens,
        max_turns=reward.max_turns,
        max_new_tokens=reward.max_new_tokens,
        max_tool_tokens=reward.max_tool_tokens,
        temperature=reward.temperature,
        top_k=settings.trainer.search_top_k,
        done=lambda turn: bool(last_tag(turn, "answer")),
    )


class Attempts:
    """Runs the attempts of one process; all questions share its clients and its places."""

    def __init__(self, conversations: Conversations, settings: Settings) -> None:
        self._conversations = conversations
        self._manner = solver_manner(settings)
        self._settings = settings.trainer.reward
        self._prompts = settings.trainer.prompts
        self._places = asyncio.Semaphore(self._settings.concurrency)

    async def answer(self, question: str, seeds: Sequence[int]) -> list[Attempt]:
        """One attempt per seed, in their order, all at once as far as there are places."""
        until = time.monotonic() + self._settings.question_deadline_s
        return await asyncio.gather(*[self._queue(question, seed, until) for seed in seeds])

    async def _queue(self, question: str, seed: int, until: float) -> Attempt:
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await self._places.acquire()
        except TimeoutError:
            waited = f"none of {self._settings.concurrency} places was free within the question's deadline"
            return Attempt(answer="", ended="deadline", searches=0, seed=seed, seconds=0.0, problem=waited)
        try:
            return await self._attempt(question, seed, until)
        finally:
            self._places.release()

    async def _attempt(self, question: str, seed: int, until: float) -> Attempt:
        started = time.monotonic()
        messages = solver_messages(question, self._prompts, self._settings.worked_examples)
        until = min(until, started + self._settings.attempt_deadline_s)
        talk = self._conversations.begin(messages, seed=seed, until=until)
        answer = problem = ""
        try:
            ended = await self._conversations.hold(talk, self._manner)
            answer = last_tag(talk.turns[-1], "answer") if ended == "done" else ""
            ended = ENDED.get(ended, "answered")
        except ServiceError as error:
            ended, problem = ended_by(error), str(error)
        seconds = time.monotonic() - started
        return Attempt(answer, ended, len(talk.searches), seed=seed, seconds=seconds, problem=problem)


def ended_by(error: ServiceError) -> str:
    """`Attempt.ended` of an attempt that met `error`."""
    if isinstance(error, Overdue):
        return "deadline"
    if isinstance(error, Refused) and OVER_CONTEXT.search(str(error)):
        return "length"
    return "solver" if error.service == "solver" else "search"
