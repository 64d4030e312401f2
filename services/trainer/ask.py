"""Ask the agent that :8001 serves: `python -m services.trainer.ask "question"`, or `--page` for a page in a browser.

It answers as in the solver's attempts, with the search, greedily unless a temperature is given. What it thinks and
finds is printed as it comes; then follow the answer, the papers that it was shown or cites, and the weights that
answered. With `--json` one JSON object is all that is printed. Needs the services solver and retrieval; both are asked
before the question is, so that one that is away is said at once.
"""

import argparse
import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from urllib.parse import quote

import structlog

from services.trainer.attempts import ENDED, ended_by, solver_manner
from services.trainer.conversations import Conversations, Manner, Talk, TokenMeasure, queries_of
from services.trainer.matching import cited_pmids
from services.trainer.protocol import solver_messages
from services.trainer.serving import served_by
from services.trainer.tokens import Tokens
from shared.clients import SearchClient, ServiceError, SolverClient
from shared.command import UsageError, plain, run
from shared.model_files import resolve_model
from shared.records import Hit, Paper
from shared.settings import Settings
from shared.transcript import last_tag

NOTICE = "This answer was written by a language model. It may be wrong, and it is no medical advice."
PATIENCE_S = 5.0  # how long a service may take to say that it is there
OUTCOMES = {
    "no_answer": "The model ended without an answer.",
    "length": "The model ran out of room before it came to an answer.",
}
BEGINS_ACTING = re.compile(r"<(?:tool_call|answer)>")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Source:
    """A paper behind an answer; one that was cited but never shown has no title, journal or year."""

    pmid: str
    title: str
    journal: str
    year: str
    link: str
    shown: bool
    cited: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One turn of the model: its thought, and what it searched for and was shown."""

    thought: str
    queries: tuple[str, ...]
    papers: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answered question; `answer` is "" unless it ended as `answered`."""

    question: str
    answer: str
    ended: str  # answered, no_answer or length
    steps: tuple[Step, ...]
    sources: tuple[Source, ...]
    weights: str
    seconds: float
    notice: str = NOTICE


class HeardSearch(SearchClient):
    """The search service, as it is asked for one question: what it finds is said and kept."""

    def __init__(self, urls: str, *, patience_s: float, say: Say) -> None:
        super().__init__(urls, patience_s=patience_s, connections=1)
        self.papers: dict[str, Paper] = {}
        self._say = say

    async def search(self, queries: list[str], top_k: int, *, patience_s: float | None = None) -> list[list[Hit]]:
        """As SearchClient's."""
        for query in queries:
            self._say(f"searches: {query}")
        results = await super().search(queries, top_k, patience_s=patience_s)
        found = {hit.paper.pmid: hit.paper for hits in results for hit in hits}
        self.papers |= found
        for paper in found.values():
            self._say(f"  PMID {paper.pmid}  {paper.title}")
        return results


def checked_question(text: str, settings: Settings, what: str = "question") -> str:
    """The question, or topic, as it is asked; UsageError when there is none or it is too long to be searched for."""
    question = text.strip().encode("utf-8", "replace").decode()
    most = settings.retrieval.max_query_chars
    if not question:
        raise UsageError(f"expected a {what}, found none; give one")
    if len(question) > most:
        raise UsageError(
            f"expected a {what} of at most {most} characters (DRZERO_RETRIEVAL__MAX_QUERY_CHARS), found one of "
            f"{len(question)}; shorten it"
        )
    return question


def served_tokens(settings: Settings) -> Tokens:
    """The tokenizer of the served model."""
    return Tokens(resolve_model(settings.solver.model, settings))


async def answer_question(
    question: str, settings: Settings, tokens: TokenMeasure, *, temperature: float = 0.0, say: Say = lambda _: None
) -> Answer:
    """Ask a checked question; `say` hears each thought, search and paper as it comes. Raises ServiceError.

    It is given up after `reward.attempt_deadline_s`.
    """
    began = time.monotonic()
    trainer = settings.trainer
    manner = solver_manner(settings)

    def done(turn: str) -> bool:
        if thought := thought_of(turn):
            say(thought)
        return manner.done(turn)

    async with (
        SolverClient(settings.solver.url, patience_s=PATIENCE_S, connections=1) as solver,
        HeardSearch(settings.retrieval.url, patience_s=PATIENCE_S, say=say) as search,
    ):
        await search.call("GET", "/ready")
        before = await served_by(solver)
        conversations = Conversations(solver, search, tokens)
        messages = solver_messages(question, trainer.prompts, trainer.reward.worked_examples)
        talk = conversations.begin(messages, seed=trainer.seed, until=began + trainer.reward.attempt_deadline_s)
        ended = await held(conversations, talk, replace(manner, temperature=temperature, done=done))
        after = await served_by(solver)
    return Answer(
        question=question,
        answer=last_tag(talk.turns[-1], "answer") if ended == "answered" else "",
        ended=ended,
        steps=steps_of(talk, search.papers),
        sources=sources_of(talk, search.papers),
        weights=before if before == after else f"{before}, then {after}",
        seconds=round(time.monotonic() - began, 3),
    )


async def held(conversations: Conversations, talk: Talk, manner: Manner) -> str:
    """Hold a talk to its end; returns `Answer.ended`, and raises ServiceError but for a talk that is too long."""
    try:
        return ENDED.get(await conversations.hold(talk, manner), "answered")
    except ServiceError as error:
        if ended_by(error) != "length":
            raise
        return "length"


def thought_of(turn: str) -> str:
    """What a turn says before it searches or answers, without its tags."""
    return re.sub(r"</?think>", "", BEGINS_ACTING.split(turn)[0]).strip()


def steps_of(talk: Talk, papers: Mapping[str, Paper]) -> tuple[Step, ...]:
    """The turns of a talk, each with the search that followed it."""
    searches = iter(talk.searches)
    steps = []
    for turn in talk.turns:
        found = next(searches, None) if queries_of(turn) else None
        queries, pmids = (found["queries"], found["pmids"]) if found else ([], [])
        shown = dict.fromkeys(pmids)  # two queries may find the same paper
        steps.append(Step(thought_of(turn), tuple(queries), tuple(source_of(pmid, papers) for pmid in shown)))
    return tuple(steps)


def sources_of(talk: Talk, papers: Mapping[str, Paper]) -> tuple[Source, ...]:
    """The papers that a talk was shown, in order, then those that it only cites."""
    shown = dict.fromkeys(pmid for search in talk.searches for pmid in search["pmids"])
    cited = cited_pmids("\n".join(talk.turns))
    sources = [source_of(pmid, papers) for pmid in dict.fromkeys([*shown, *cited])]
    return tuple(replace(one, shown=one.pmid in shown, cited=one.pmid in cited) for one in sources)


def source_of(pmid: str, papers: Mapping[str, Paper]) -> Source:
    """A paper that has been shown; without words where it is not among `papers`."""
    paper = papers.get(pmid, Paper(pmid, "", ""))
    link = f"https://pubmed.ncbi.nlm.nih.gov/{quote(pmid, safe='')}/"
    return Source(pmid, paper.title, paper.journal, paper.pub_date[:4], link, shown=True, cited=False)


# --- for people


def summary(answer: Answer) -> list[str]:
    """The lines that follow when the model has ended."""
    lines = ["", f"Answer: {answer.answer}" if answer.answer else OUTCOMES[answer.ended]]
    if answer.sources:
        lines += ["", "Papers:"]
    for one in answer.sources:
        details = " · ".join(filter(None, [f"  PMID {one.pmid}", one.title, one.journal, one.year]))
        mark = (" (cited)" if one.shown else " (cited, but never shown to the model)") if one.cited else ""
        lines += [f"{details}{mark}", f"    {one.link}"]
    return [*lines, "", f"Weights: {answer.weights}", answer.notice]


def speak(text: str) -> None:
    """Print a line at once."""
    print(plain(text), flush=True)


def main(given: argparse.Namespace, settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Answer one question, or serve the page."""
    if given.page:
        from services.trainer.ask_page import serve_page

        serve_page(settings, log)
        return
    question = checked_question(given.question, settings)
    tokens = served_tokens(settings)
    if given.json:
        answer = asyncio.run(answer_question(question, settings, tokens, temperature=given.temperature))
        print(json.dumps(asdict(answer), indent=2))
        return
    answer = asyncio.run(answer_question(question, settings, tokens, temperature=given.temperature, say=speak))
    for line in summary(answer):
        speak(line)


def temperature_of(text: str) -> float:
    """A sampling temperature; ArgumentTypeError for what is none."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 2, found {text!r}")
    return value


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m services.trainer.ask", description="Ask the served agent.")
    parser.add_argument("question", nargs="?", default="", help="what it shall answer")
    parser.add_argument("--temperature", type=temperature_of, default=0.0, help="0 to 2; 0, the default, is greedy")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--page", action="store_true", help="serve a page for browsers on DRZERO_TRAINER__PORT")
    return parser.parse_args(words)


if __name__ == "__main__":
    raise SystemExit(run("trainer", partial(main, parsed())))
