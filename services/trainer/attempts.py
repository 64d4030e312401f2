"""The solver's attempts at a question: several multi-turn tries over HTTP, at once, with bounded concurrency.

Generation is asked of the solver service, papers of the search service. A service that stays away raises Unavailable:
an outage is never an answer, right or wrong.
"""

import asyncio
from typing import Any

from services.trainer.protocol import SEARCH_TOOL, render_results, solver_messages
from shared.clients import SearchClient, SolverClient
from shared.records import Attempt, Hit
from shared.settings import RewardSettings
from shared.transcript import last_tag, search_calls


class Attempts:
    """Runs attempts of one process; shares its clients and its limit among all questions."""

    def __init__(self, solver: SolverClient, search: SearchClient, settings: RewardSettings, *, model: str) -> None:
        self._solver = solver
        self._search = search
        self._settings = settings
        self._model = model
        self._places = asyncio.Semaphore(settings.concurrency)

    async def answer(self, question: str, top_k: int) -> list[Attempt]:
        """`settings.attempts` independent attempts at one question."""
        count = self._settings.attempts
        return await asyncio.gather(*[self._attempt(question, top_k) for _ in range(count)])

    async def _attempt(self, question: str, top_k: int) -> Attempt:
        messages = solver_messages(question, self._settings.worked_examples)
        before = len(messages)
        searches = 0
        ended = "no_answer"
        async with self._places:
            for turn in range(1, self._settings.max_turns + 1):
                reply = await self._solver.chat(self._request(messages))
                messages.append({"role": "assistant", "content": reply.text})
                calls = [call for call in search_calls(reply.text) if not call.broken]
                if last_tag(reply.text, "answer"):
                    ended = "answered"
                elif reply.finish_reason == "length":
                    ended = "length"
                if ended != "no_answer" or not calls or turn == self._settings.max_turns:
                    break
                queries = [query for call in calls for query in call.queries]
                results = await self._search.search(queries, top_k)
                searches += 1
                messages.append({"role": "tool", "content": self._render(queries, results)})
        written = "\n".join(m["content"] for m in messages[before:] if m["role"] == "assistant")
        return Attempt(answer=last_tag(written, "answer"), ended=ended, searches=searches)

    def _request(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "model": self._model,
            "messages": messages,
            "tools": [SEARCH_TOOL],
            "max_tokens": self._settings.max_new_tokens,
            "temperature": self._settings.temperature,
        }

    def _render(self, queries: list[str], results: list[list[Hit]]) -> str:
        return render_results(queries, results, self._settings.max_tool_chars)
