"""Reading what a model wrote: tags, tool calls and thinking. Never raises on any text.

Only text of the model is given to these functions, never the prompt or a search result: markup that stands in a
paper is not the model's. The last complete tag counts.
"""

import json
import re
from dataclasses import dataclass

TOOL = "search"
MAX_QUERIES = 8  # of one call; further ones are not asked
MAX_QUERY_CHARS = 1000  # of one query; the search service refuses runaway texts
BROKEN_KINDS = ("unclosed", "not_json", "no_arguments", "unknown_tool", "no_query_list", "empty_query_list")
CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
RESULT = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
# What the chat template puts between two assistant turns, with or without its special tokens.
RESULT_TURN = re.compile(
    r"(?:<\|im_end\|>)?\s*(?:<\|im_start\|>)?user\s*((?:<tool_response>.*?</tool_response>\s*)+)"
    r"(?:<\|im_end\|>)?\s*(?:<\|im_start\|>)?assistant\n?",
    re.DOTALL,
)
THINKING = re.compile(r"\s*<think>\s*\S.*?</think>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class SearchCall:
    """One call of the search tool. `broken` is one of BROKEN_KINDS, or empty."""

    queries: tuple[str, ...]
    broken: str = ""


def last_tag(text: str, name: str) -> str:
    """The stripped content of the last complete `<name>…</name>`, up to its first closing tag, or ""."""
    begun, _, _ = text.rpartition(f"</{name}>")
    _, opening, inside = begun.rpartition(f"<{name}>")
    return inside.partition(f"</{name}>")[0].strip() if opening else ""


def search_calls(text: str) -> list[SearchCall]:
    """All tool calls of one assistant turn, in order, broken ones included."""
    return [_read_call(match[1]) if match[2] else SearchCall((), "unclosed") for match in CALL.finditer(text)]


def split_response(text: str) -> tuple[list[str], list[str]]:
    """The assistant turns and the search results of a decoded response, both in order.

    For callers that have the text alone; a rollout of ours brings its turns with it.
    """
    turns, results = [], []
    start = 0
    for match in RESULT_TURN.finditer(text):
        turns.append(text[start : match.start()])
        results += [result.strip() for result in RESULT.findall(match[1])]
        start = match.end()
    turns.append(text[start:].removesuffix("<|im_end|>"))
    return turns, results


def begins_with_thinking(text: str) -> bool:
    """Whether a turn starts with a non-empty think block."""
    return THINKING.match(text) is not None


def _read_call(body: str) -> SearchCall:
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return SearchCall((), "not_json")
    if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
        return SearchCall((), "no_arguments")
    if call.get("name") != TOOL:
        return SearchCall((), "unknown_tool")
    queries = call["arguments"].get("query_list")
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        return SearchCall((), "no_query_list")
    kept = tuple(_sendable(query) for query in queries if query.strip())[:MAX_QUERIES]
    return SearchCall(kept) if kept else SearchCall((), "empty_query_list")


def _sendable(query: str) -> str:
    """A query as the search service takes it. JSON lets a model write half a surrogate pair, which no encoder takes."""
    return query.strip()[:MAX_QUERY_CHARS].encode("utf-8", "replace").decode()
