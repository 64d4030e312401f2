"""What flows between the parts: one frozen record per arrow of the data's way.

Keys of `Paper.as_record()` are the corpus contract (Search-R1 style clients read `id` and `contents`).
"""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Paper:
    """One paper of the corpus, all text as PubMed has it, inline markup flattened.

    `pub_date` is ISO as far as known ("2021", "2021-03", "2021-03-09") or "", `pub_date_text` what was written.
    Headings are MEDLINE's ("Neoplasms/*genetics": a star marks a major topic). A link is its type and a PMID, or the
    reference where there is no PMID ("RetractionIn 123").
    """

    pmid: str
    title: str
    abstract: str
    authors: tuple[str, ...] = ()
    journal: str = ""
    pub_date: str = ""
    mesh_terms: tuple[str, ...] = ()
    doi: str = ""
    vernacular_title: str = ""
    journal_abbreviation: str = ""
    issn: str = ""
    pub_date_text: str = ""
    pmc: str = ""
    languages: tuple[str, ...] = ()
    publication_types: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    mesh_headings: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    retracted: bool = False

    @property
    def text(self) -> str:
        """What is embedded: title, one space, abstract."""
        return f"{self.title} {self.abstract}".strip()

    @property
    def contents(self) -> str:
        """Search-R1's form: title line, newline, abstract."""
        return f"{self.title}\n{self.abstract}"

    def as_record(self) -> dict[str, Any]:
        """The corpus record, JSON-ready, with the contract's keys."""
        values = {name: getattr(self, name) for name in PAPER_FIELDS}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"id": self.pmid, **plain, "text": self.text, "contents": self.contents}


PAPER_FIELDS = tuple(field.name for field in fields(Paper))


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result; results of a query are ordered by `score`, the best first.

    `dense` is the inner product of the two unit vectors, in [-1, 1], `bm25` the score by words; None where the search
    did not compute it. `score` is one of them or their fusion (`retrieval.mode`), or what a reranker says.
    """

    paper: Paper
    score: float
    dense: float | None = None
    bm25: float | None = None
    highlight: str = ""  # the sentence of the abstract that fits best, when asked for


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer of the solver service."""

    text: str
    finish_reason: str  # "stop" or "length"
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Seed:
    """A paper from which a question of `hop` hops is to be made."""

    index: int
    pmid: str
    hop: int
    document: str


LOST = frozenset({"deadline", "solver", "search"})


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of the solver at a question.

    `ended` says why it ended. Judged: `answered`, `no_answer` (the last turn had none), `length` (out of tokens).
    Lost, and therefore neither right nor wrong: `deadline`, `solver` or `search` (the service that failed).
    """

    answer: str
    ended: str
    searches: int
    seed: int
    seconds: float
    problem: str = ""  # what a lost attempt met

    @property
    def lost(self) -> bool:
        """Whether nothing can be said about the answer."""
        return self.ended in LOST
