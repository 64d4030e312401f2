"""What proposer and solver are told: prompts, the tool's schema, search results, the form of a guided tool call.

The prompts are the files of `prompts/`; their content hash is part of every manifest they shape.
"""

import hashlib
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


@cache
def prompt_text(name: str) -> str:
    """The template of `proposer` or `solver`."""
    return (PROMPTS / f"{name}.md").read_text(encoding="utf-8")


def prompt_hash(name: str) -> str:
    """sha256 of a prompt file: its version in manifests."""
    return hashlib.sha256(prompt_text(name).encode()).hexdigest()


def proposer_prompt(seed: Seed) -> str:
    """The user message that asks for a question of `seed.hop` hops."""
    return prompt_text("proposer").format(hop=seed.hop, searches=seed.hop - 1, pmid=seed.pmid, document=seed.document)


def solver_prompt(question: str) -> str:
    """The user message that asks for an answer."""
    return prompt_text("solver").format(question=question)


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
