"""Conversations of a served model with search, over HTTP: generate, search, go on, as proposer or solver.

Generation is asked of the solver service, papers of the search service; a service that fails raises its ServiceError.
The tokens of the context are counted so that no turn is asked for that has no room.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.trainer.protocol import SEARCH_TOOL, Message, last_turn_note, render_results
from shared.clients import SearchClient, SolverClient
from shared.records import Completion
from shared.transcript import search_calls

USEFUL_TOKENS = 16  # fewer do not hold an answer in its tags
TEMPLATE_TOKENS = 256  # bound on the tool's schema and what a chat template adds to a first request
TURN_TOKENS = 32  # bound on what a chat template adds for one more turn and its search result


class TokenMeasure(Protocol):
    """What is asked of `tokens.Tokens`."""

    def count(self, text: str) -> int: ...
    def cut(self, text: str, tokens: int) -> str: ...


@dataclass(frozen=True, slots=True)
class Manner:
    """How a role talks."""

    role: str
    model: str
    context_tokens: int
    max_turns: int
    max_new_tokens: int
    max_tool_tokens: int
    temperature: float
    top_k: int
    done: Callable[[str], bool]  # whether a turn ends the conversation
    first_regex: str = ""  # what the first turn must match
    tool: bool = True  # whether the prompt offers the search


@dataclass(slots=True)
class Talk:
    """One conversation while it lasts."""

    messages: list[Message]
    seed: int
    until: float  # its deadline, in time.monotonic()
    used: int  # tokens of the context that the next prompt takes, at most
    turns: list[str] = field(default_factory=list)
    searches: list[dict[str, Any]] = field(default_factory=list)  # queries, pmids, text

    @property
    def left_s(self) -> float:
        """Seconds to the deadline."""
        return self.until - time.monotonic()


@dataclass(frozen=True, slots=True)
class Conversations:
    """The services of a process, shared by all its conversations."""

    solver: SolverClient
    search: SearchClient
    tokens: TokenMeasure  # of the served model

    def begin(self, messages: list[Message], *, seed: int, until: float) -> Talk:
        """A talk that has not begun; `until` is its deadline."""
        used = sum(self.tokens.count(message["content"]) for message in messages) + TEMPLATE_TOKENS
        return Talk(messages=messages, seed=seed, until=until, used=used)

    async def hold(self, talk: Talk, manner: Manner) -> str:
        """Hold a talk to its end, and say why it ended: `done`, `length` (out of tokens) or `open` (nothing to do).

        Raises ServiceError; the talk has what was said until then.
        """
        for turn in range(1, manner.max_turns + 1):
            room = min(manner.max_new_tokens, manner.context_tokens - talk.used)
            if room < min(USEFUL_TOKENS, manner.max_new_tokens):
                return "length"
            reply = await self.solver.chat(request(talk, manner, room), patience_s=talk.left_s)
            talk.turns.append(reply.text)
            if manner.done(reply.text):
                return "done"
            if reply.finish_reason == "length":
                return "length"
            queries = queries_of(reply.text) if manner.tool else []
            if not queries or turn == manner.max_turns:
                break
            note = last_turn_note(manner.role) if turn == manner.max_turns - 1 else ""
            await self._look_up(talk, manner, reply, queries, note=note)
        return "open"

    async def _look_up(self, talk: Talk, manner: Manner, reply: Completion, queries: list[str], *, note: str) -> None:
        """Search, and put the turn and what it found into the talk."""
        results = await self.search.search(queries, manner.top_k, patience_s=talk.left_s)
        found = render_results(queries, results, self.tokens.cut, manner.max_tool_tokens)
        shown = [hit.paper.pmid for hits in results for hit in hits if f"PMID {hit.paper.pmid}:" in found]
        talk.searches.append({"queries": queries, "pmids": shown, "text": found})
        text = f"{found}\n\n{note}" if note else found
        talk.messages += [{"role": "assistant", "content": reply.text}, {"role": "tool", "content": text}]
        talk.used = reply.prompt_tokens + reply.new_tokens + self.tokens.count(text) + TURN_TOKENS


def request(talk: Talk, manner: Manner, max_tokens: int) -> dict[str, Any]:
    """The body of the next turn's request."""
    body: dict[str, Any] = {
        "model": manner.model,
        "messages": talk.messages,
        "max_tokens": max_tokens,
        "temperature": manner.temperature,
        "seed": talk.seed,
    }
    if manner.tool:
        body["tools"] = [SEARCH_TOOL]
    if manner.first_regex and not talk.turns:
        body["regex"] = manner.first_regex
    return body


def queries_of(text: str) -> list[str]:
    """The queries of all well-formed calls of a turn."""
    return [query for call in search_calls(text) if not call.broken for query in call.queries]
