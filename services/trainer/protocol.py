"""What proposer and solver are told: prompts, the tool's schema, search results, the form of a guided tool call.

The prompts are the files of `prompts/`, in sets with a version in their name (`trainer.prompts`): `full-v1` explains
hops, searches and rules to a model that can follow them, `short-v1` leaves that to worked examples. The content hash of
a set is part of every manifest it shapes; a changed wording gets a new set.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from shared.records import Hit, Seed
from shared.transcript import TOOL, last_tag

PROMPTS = Path(__file__).parent / "prompts"
AGENT = "search_agent"  # the name under which verl knows agent_loop.py
PARSER = "drzero"  # the name under which verl knows its reader of tool calls
TRAINER = "drzero"  # the name under which verl knows verl_trainer.py
DEADLINE = "deadline"  # what a rollout that takes too long is lost to
SOURCE = "search_biomedical_"  # followed by the number of hops; verl reports per data_source

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


SEEDED = re.compile(rf"{SOURCE}([1-9])")

Message = dict[str, Any]


def hop_of(data_source: str) -> int:
    """The hop number of `search_biomedical_<hop>`; ValueError for any other source."""
    match = SEEDED.fullmatch(data_source)
    if match is None:
        raise ValueError(f"expected a data_source of the form {SOURCE}<hop>, got {data_source!r}")
    return int(match[1])


@cache
def prompt_file(name: str) -> str:
    """The text of one file of `prompts/`, e.g. "full-v1/solver.md"."""
    return (PROMPTS / name).read_text(encoding="utf-8").strip()


def prompt_hash(role: str, prompts: str) -> str:
    """sha256 over the prompt files of `proposer` or `solver` in a set: their identity in manifests."""
    files = (f"{prompts}/{role}_system.md", f"{prompts}/{role}.md", f"{role}_examples.json", f"{role}_last_turn.md")
    return _hash_of(files)


def alone_hash(prompts: str) -> str:
    """sha256 over the prompt files of a solver without search in a set."""
    names = ("solver_alone_system.md", "solver_evidence.md", "solver.md")
    return _hash_of([*(f"{prompts}/{name}" for name in names), "solver_examples.json"])


def _hash_of(files: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(map(prompt_file, files)).encode()).hexdigest()


def last_turn_note(role: str) -> str:
    """What `proposer` or `solver` reads below the search result that comes before its last turn."""
    return prompt_file(f"{role}_last_turn.md")


def proposer_messages(seed: Seed, prompts: str, examples: int) -> list[Message]:
    """The conversation that asks for a question of `seed.hop` hops."""

    def request(hop: int, pmid: str, document: str) -> str:
        text = prompt_file(f"{prompts}/proposer.md")
        return text.format(hop=hop, searches=hop - 1, pmid=pmid, document=document)

    worked = [
        _turns(request(example["hop"], example["pmid"], example["document"]), example)
        for example in _examples("proposer", "search" if seed.hop > 1 else "direct", examples)
    ]
    return _conversation("proposer", prompts, worked, request(seed.hop, seed.pmid, seed.document))


def solver_messages(question: str, prompts: str, examples: int) -> list[Message]:
    """The conversation that asks for an answer."""
    text = prompt_file(f"{prompts}/solver.md")
    worked = [
        _turns(text.format(question=example["question"]), example)
        for example in _examples("solver", "search", examples)
    ]
    return _conversation("solver", prompts, worked, text.format(question=question))


def alone_messages(question: str, prompts: str, examples: int, *, evidence: str = "") -> list[Message]:
    """The conversation that asks a solver without search for an answer, after reading `evidence` if there is any."""
    bare = prompt_file(f"{prompts}/solver.md")
    worked = [
        _turns(bare.format(question=example["question"]), example)
        for example in _examples("solver", "direct", examples)
    ]
    request = prompt_file(f"{prompts}/solver_evidence.md") if evidence else bare
    return _conversation("solver_alone", prompts, worked, request.format(question=question, evidence=evidence))


@cache
def example_questions() -> tuple[str, ...]:
    """The questions of all worked examples of both roles."""
    proposed = [
        last_tag(turn["content"], "question")
        for example in json.loads(prompt_file("proposer_examples.json")).values()
        for turn in example["turns"]
    ]
    solved = [example["question"] for example in json.loads(prompt_file("solver_examples.json")).values()]
    return tuple(sorted({*filter(None, proposed), *solved}))


def _conversation(role: str, prompts: str, worked: Sequence[list[Message]], request: str) -> list[Message]:
    """System message, worked examples as earlier turns, and the request.

    Small models follow a form they have seen in a conversation far better than one that is described to them.
    """
    return [
        {"role": "system", "content": prompt_file(f"{prompts}/{role}_system.md")},
        *[message for example in worked for message in example],
        {"role": "user", "content": request},
    ]


def _examples(role: str, first: str, count: int) -> list[dict[str, Any]]:
    """The last `count` of two worked examples: the one called `first`, then the plain one next to the request."""
    worked = json.loads(prompt_file(f"{role}_examples.json"))
    return [worked[first], worked["last"]][2 - count :]


def _turns(request: str, example: dict[str, Any]) -> list[Message]:
    return [{"role": "user", "content": request}, *example["turns"]]


def render_results(
    queries: Sequence[str], results: Sequence[Sequence[Hit]], cut: Callable[[str, int], str], max_tokens: int
) -> str:
    """What the model reads of its searches: PMID, title and as much of each abstract as fits `max_tokens` in all.

    `cut(text, tokens)` shortens a text to a number of the model's tokens (`tokens.Tokens.cut`).
    """
    papers = sum(len(hits) for hits in results)
    share = max_tokens // max(papers, 1)
    blocks = []
    for query, hits in zip(queries, results, strict=True):
        lines = [f"Results for: {query}"] if len(queries) > 1 else []
        lines += [cut(f"PMID {hit.paper.pmid}: {hit.paper.title}. {hit.paper.abstract}", share) for hit in hits]
        blocks.append("\n".join(lines) if hits else "No paper found.")
    return cut("\n\n".join(blocks), max_tokens)
