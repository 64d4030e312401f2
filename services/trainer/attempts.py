"""The solver's attempts at a question: several multi-turn tries over HTTP, at once, with bounded concurrency.

Generation is asked of the solver service, papers of the search service. A service that fails costs the attempt: it
comes back lost (`Attempt.lost`), neither right nor wrong, and no ServiceError leaves this file. An attempt's deadline
starts when it gets its place; the time before counts against the deadline of the question alone. The answer is the
last answer tag of a turn that the model itself wrote.
"""

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from services.trainer.protocol import SEARCH_TOOL, Message, last_turn_note, render_results, solver_messages
from shared.clients import Overdue, Refused, SearchClient, ServiceError, SolverClient
from shared.records import Attempt, Completion
from shared.settings import RewardSettings
from shared.transcript import last_tag, search_calls

USEFUL_TOKENS = 16  # fewer do not hold an answer in its tags
TEMPLATE_TOKENS = 256  # bound on the tool's schema and what a chat template adds to a first request
TURN_TOKENS = 32  # bound on what a chat template adds for one more turn and its search result
OVER_CONTEXT = re.compile(r" 400: .*(context length|the context of \d)", re.DOTALL)  # SGLang's words and our server's


class TokenMeasure(Protocol):
    """What is asked of `tokens.Tokens`."""

    def count(self, text: str) -> int: ...
    def cut(self, text: str, tokens: int) -> str: ...


@dataclass(slots=True)
class Talk:
    """One attempt while it lasts."""

    messages: list[Message]
    seed: int
    until: float  # its deadline, in time.monotonic()
    used: int  # tokens of the context that the next prompt takes, at most
    searches: int = 0

    @property
    def left_s(self) -> float:
        """Seconds to the deadline."""
        return self.until - time.monotonic()


class Attempts:
    """Runs the attempts of one process; all questions share its clients and its places."""

    def __init__(
        self,
        solver: SolverClient,
        search: SearchClient,
        settings: RewardSettings,
        *,
        model: str,
        prompts: str,
        top_k: int,
        context_tokens: int,
        tokens: TokenMeasure,
    ) -> None:
        """`model`, `context_tokens` and `tokens` are of the solver; `prompts` is the set of `trainer.prompts`."""
        self._solver = solver
        self._search = search
        self._settings = settings
        self._model = model
        self._prompts = prompts
        self._top_k = top_k
        self._context_tokens = context_tokens
        self._tokens = tokens
        self._places = asyncio.Semaphore(settings.concurrency)

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
        talk = Talk(
            messages=messages,
            seed=seed,
            until=min(until, started + self._settings.attempt_deadline_s),
            used=sum(self._tokens.count(message["content"]) for message in messages) + TEMPLATE_TOKENS,
        )
        answer = problem = ""
        try:
            ended, answer = await self._converse(talk)
        except ServiceError as error:
            ended, problem = ended_by(error), str(error)
        seconds = time.monotonic() - started
        return Attempt(answer=answer, ended=ended, searches=talk.searches, seed=seed, seconds=seconds, problem=problem)

    async def _converse(self, talk: Talk) -> tuple[str, str]:
        """Why a judged attempt ended, and its answer or ""; raises ServiceError."""
        last = self._settings.max_turns
        for turn in range(1, last + 1):
            room = min(self._settings.max_new_tokens, self._context_tokens - talk.used)
            if room < min(USEFUL_TOKENS, self._settings.max_new_tokens):
                return "length", ""
            reply = await self._solver.chat(self._request(talk, room), patience_s=talk.left_s)
            answer = last_tag(reply.text, "answer")
            if answer:
                return "answered", answer
            if reply.finish_reason == "length":
                return "length", ""
            queries = queries_of(reply.text)
            if not queries or turn == last:
                break
            await self._look_up(talk, reply, queries, note=last_turn_note("solver") if turn == last - 1 else "")
        return "no_answer", ""

    async def _look_up(self, talk: Talk, reply: Completion, queries: list[str], *, note: str) -> None:
        """Search, and put the turn and what it found into the talk."""
        results = await self._search.search(queries, self._top_k, patience_s=talk.left_s)
        found = render_results(queries, results, self._tokens.cut, self._settings.max_tool_tokens)
        text = f"{found}\n\n{note}" if note else found
        talk.searches += 1
        talk.messages += [{"role": "assistant", "content": reply.text}, {"role": "tool", "content": text}]
        talk.used = reply.prompt_tokens + reply.new_tokens + self._tokens.count(text) + TURN_TOKENS

    def _request(self, talk: Talk, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "messages": talk.messages,
            "tools": [SEARCH_TOOL],
            "max_tokens": max_tokens,
            "temperature": self._settings.temperature,
            "seed": talk.seed,
        }


def queries_of(text: str) -> list[str]:
    """The queries of all well-formed calls of a turn."""
    return [query for call in search_calls(text) if not call.broken for query in call.queries]


def ended_by(error: ServiceError) -> str:
    """`Attempt.ended` of an attempt that met `error`."""
    if isinstance(error, Overdue):
        return "deadline"
    if isinstance(error, Refused) and OVER_CONTEXT.search(str(error)):
        return "length"
    return "solver" if error.service == "solver" else "search"
