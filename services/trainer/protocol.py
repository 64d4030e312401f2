"""What proposer and solver are told: prompts, the tool's schema, search results, the form of a guided tool call.

The prompts are the files of `prompts/`; their content hash is part of every manifest they shape.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from shared.records import Hit, Seed
from shared.transcript import TOOL

PROMPTS = Path(__file__).parent / "prompts"
AGENT = "search_agent"  # the name under which verl knows agent_loop.py
PARSER = "drzero"  # the name under which verl knows its reader of tool calls

# verl keeps only type, description and enum of a property: that the items are strings must stand in the words.
SEARCH_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": TOOL,
        "description": "Search PubMed abstracts by meaning. Returns papers with their PMIDs.",
        "parameters": {
            "type": "object",
            "properties": {"query_list": {"type": "array", "description": "List of query strings."}},
            "required": ["query_list"],
        },
    },
}

# A first turn under `guided_tool_call`: a thought and one well-formed call. Words and query are the model's own.
GUIDED_CALL = (
    r"<think>[^<>\n]{8,160}</think>\n"
    r'<tool_call>\n\{"name": "search", "arguments": \{"query_list": \["[A-Za-z0-9][A-Za-z0-9 ,()/+-]{2,79}"\]\}\}'
    r"\n</tool_call>"
)


Message = dict[str, Any]


@cache
def prompt_file(name: str) -> str:
    """The text of one file of `prompts/`."""
    return (PROMPTS / name).read_text(encoding="utf-8").strip()


def prompt_hash(role: str) -> str:
    """sha256 over the prompt files of `proposer` or `solver`: their version in manifests."""
    files = (f"{role}_system.md", f"{role}.md", f"{role}_examples.json")
    return hashlib.sha256("\0".join(map(prompt_file, files)).encode()).hexdigest()


def conversation(role: str, request: str, *, first: str, examples: int) -> list[Message]:
    """System message, worked examples as earlier turns, and the request.

    Small models follow a form they have seen in a conversation far better than one that is described to them. The
    example next to the request is always the plain one; with two, `first` names the other ("search" or "direct").
    """
    worked = json.loads(prompt_file(f"{role}_examples.json"))
    shown = [worked[first], worked["last"]][2 - examples :]
    turns: list[Message] = [message for example in shown for message in example]
    return [
        {"role": "system", "content": prompt_file(f"{role}_system.md")},
        *turns,
        {"role": "user", "content": request},
    ]


def proposer_messages(seed: Seed, examples: int) -> list[Message]:
    """The conversation that asks for a question of `seed.hop` hops."""
    request = prompt_file("proposer.md").format(
        hop=seed.hop, searches=seed.hop - 1, pmid=seed.pmid, document=seed.document
    )
    return conversation("proposer", request, first="search" if seed.hop > 1 else "direct", examples=examples)


def solver_messages(question: str, examples: int) -> list[Message]:
    """The conversation that asks for an answer."""
    request = prompt_file("solver.md").format(question=question)
    return conversation("solver", request, first="search", examples=examples)


def render_results(queries: Sequence[str], results: Sequence[Sequence[Hit]], max_chars: int) -> str:
    """What the model reads of its searches: PMID, title and as much of each abstract as fits `max_chars` in all."""
    papers = sum(len(hits) for hits in results)
    share = max_chars // max(papers, 1)
    blocks = []
    for query, hits in zip(queries, results, strict=True):
        lines = [f"Results for: {query}"] if len(queries) > 1 else []
        lines += [f"PMID {hit.paper.pmid}: {hit.paper.title}. {hit.paper.abstract}"[:share] for hit in hits]
        blocks.append("\n".join(lines) if hits else "No paper found.")
    return "\n\n".join(blocks)[:max_chars]
