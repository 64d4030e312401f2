"""Reading what a model wrote: tags, tool calls and thinking. Never raises on any text.

Only text of the model is given to these functions, never the prompt or a search result: markup that stands in a
paper is not the model's. The last complete tag counts.
"""

import json
import re
from dataclasses import dataclass

TOOL = "search"
CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
THINKING = re.compile(r"\s*<think>\s*\S.*?</think>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class SearchCall:
    """One call of the search tool. `broken` says what is wrong with it, or is empty."""

    queries: tuple[str, ...]
    broken: str = ""


def last_tag(text: str, name: str) -> str:
    """The stripped content of the last complete `<name>…</name>`, or ""."""
    end = text.rfind(f"</{name}>")
    start = text.rfind(f"<{name}>", 0, max(end, 0))
    return text[start + len(name) + 2 : end].strip() if 0 <= start < end else ""


def search_calls(text: str) -> list[SearchCall]:
    """All tool calls of one assistant turn, in order, broken ones included."""
    return [_read_call(body) for body in CALL.findall(text)]


def begins_with_thinking(text: str) -> bool:
    """Whether a turn starts with a non-empty think block."""
    return THINKING.match(text) is not None


def _read_call(body: str) -> SearchCall:
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return SearchCall((), "not JSON")
    if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
        return SearchCall((), "no arguments object")
    if call.get("name") != TOOL:
        return SearchCall((), "unknown tool")
    queries = call["arguments"].get("query_list")
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        return SearchCall((), "query_list is no list of strings")
    kept = tuple(query.strip() for query in queries if query.strip())
    return SearchCall(kept) if kept else SearchCall((), "empty query_list")
