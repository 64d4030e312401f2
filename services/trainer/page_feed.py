"""The feed of rollouts: the fields of its form → a filter, and rollouts → what their cards show.

A field that cannot be used raises WrongForm with its name and what is expected. Papers are looked up in the corpus,
where there is one; all text is passed on as models and papers wrote it, and the template escapes it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlencode

from services.trainer.charts import short
from services.trainer.page_index import Cursor, Found, RunIndex, Wanted
from services.trainer.page_view import clock
from services.trainer.records import NOT_PARTS
from services.trainer.report import ANSWER_PARTS, PARTS
from shared.corpus import Corpus
from shared.files import ArtifactError
from shared.records import Paper

PAGE = 20
LONGEST_FIELD = 200
LARGEST = 10**9
CORPUS_LOCK = Lock()  # a corpus is read by one thread at a time
FIELDS = ("round", "role", "split", "step", "hop", "low", "high", "valid", "solved", "text", "before", "after")
CHOICES: Mapping[str, Mapping[str, str]] = {
    "role": {"": "both", "proposer": "proposer", "solver": "solver"},
    "split": {"": "all", "train": "training", "held_out": "validation"},
    "valid": {"": "all", "yes": "valid", "no": "lost"},
    "solved": {
        "": "any", "sometimes": "sometimes", "never": "never", "always": "always", "unasked": "not attempted",
    },
}  # fmt: skip
LABELS = dict([*ANSWER_PARTS, *PARTS, ("exact_match", "exact match"), ("format_answer_given", "answer given")])


class WrongForm(ValueError):
    """A field of the form cannot be used; the text says which and what is expected."""


@dataclass(frozen=True, slots=True)
class Search:
    """One search of a rollout, and the papers that it showed."""

    queries: Sequence[str]
    papers: Sequence[tuple[str, str]]  # PMID and title


@dataclass(frozen=True, slots=True)
class Card:
    """One rollout as the feed shows it."""

    found: Found
    when: str
    paper: Paper | None
    searches: Sequence[Search]
    parts: Sequence[tuple[str, str]]

    @property
    def verdict(self) -> Mapping[str, Any]:
        """The whole verdict."""
        return self.found.verdict


@dataclass(frozen=True, slots=True)
class Feed:
    """A page of rollouts, and what its links and its form need."""

    fields: Mapping[str, str]
    cards: Sequence[Card]
    count: int
    newest: int  # id of the rollout taken in last
    older: str  # query string of the next page, "" at the end
    filters: str  # query string of the first page


def feed_of(index: RunIndex, fields: Mapping[str, str], corpus: Path) -> Feed:
    """The page of rollouts that the fields ask for; raises WrongForm."""
    wanted, newest = wanted_of(fields), index.newest()
    found = index.find(wanted, before=cursor_of(fields["before"]), limit=PAGE + 1)
    shown, older = found[:PAGE], ""
    if len(found) > PAGE:
        older = filters_of(fields, before=f"{shown[-1].time!r}_{shown[-1].id}")
    cards = [card(one, corpus, titles=False) for one in shown]
    return Feed(fields, cards, index.count(wanted), newest, older, filters_of(fields))


def filters_of(fields: Mapping[str, str], **more: str) -> str:
    """The filters, and what else there is, as the query string of a page."""
    filters = {name: value for name, value in fields.items() if value and name not in ("before", "after")}
    return urlencode(filters | more)


def fields_of(given: Mapping[str, str]) -> dict[str, str]:
    """The fields of the form, "" where one is not given; raises WrongForm for an overlong one."""
    fields = {name: given.get(name, "").strip() for name in FIELDS}
    for name, value in fields.items():
        if len(value) > LONGEST_FIELD:
            raise WrongForm(f"{name} has {len(value)} characters; expected at most {LONGEST_FIELD}.")
    return fields


def wanted_of(fields: Mapping[str, str]) -> Wanted:
    """The filter that the fields say; raises WrongForm."""
    for name, choices in CHOICES.items():
        if fields[name] not in choices:
            raise WrongForm(f"{name} is {fields[name]!r}; expected {', '.join(filter(None, choices))} or nothing.")
    return Wanted(
        round=whole_number(fields, "round"),
        role=fields["role"],
        split=fields["split"],
        step=whole_number(fields, "step"),
        hop=whole_number(fields, "hop"),
        low=number(fields, "low"),
        high=number(fields, "high"),
        valid={"": None, "yes": True, "no": False}[fields["valid"]],
        solved=fields["solved"],
        text=fields["text"],
    )


def whole_number(fields: Mapping[str, str], name: str) -> int | None:
    """A field that is empty or a whole number; raises WrongForm."""
    text = fields[name]
    if text and not re.fullmatch(r"[0-9]{1,9}", text):
        raise WrongForm(f"{name} is {text[:20]!r}; expected a whole number.")
    return int(text) if text else None


def number(fields: Mapping[str, str], name: str) -> float | None:
    """A field that is empty or a number; raises WrongForm."""
    text = fields[name].replace(",", ".")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST:
        raise WrongForm(f"{name} is {text[:20]!r}; expected a number.")
    return value


def cursor_of(text: str) -> Cursor | None:
    """Where a page begins; raises WrongForm."""
    if not text:
        return None
    moment, _, last = text.partition("_")
    if not re.fullmatch(r"[0-9.e+]{1,30}", moment) or not re.fullmatch(r"[0-9]{1,15}", last):
        raise WrongForm(f"before is {text[:20]!r}; expected the address of a page.")
    try:
        return float(moment), int(last)
    except ValueError as error:
        raise WrongForm(f"before is {text[:20]!r}; expected the address of a page.") from error


def card(found: Found, corpus: Path, *, titles: bool) -> Card:
    """What is shown of a rollout; with `titles` of the papers found, of which a page would have hundreds."""
    verdict = found.verdict
    searches = [
        Search(search["queries"], [(pmid, title_of(corpus, str(pmid)) if titles else "") for pmid in search["pmids"]])
        for search in verdict["searches"]
    ]
    parts = [
        (LABELS.get(name, name.replace("_", " ")), short(float(value)))
        for name, value in verdict.items()
        if isinstance(value, float) and name not in NOT_PARTS and name not in ("score", "valid")
    ]
    return Card(found, clock(found.time), paper_of(corpus, str(verdict["pmid"])), searches, parts)


def title_of(corpus: Path, pmid: str) -> str:
    """The title of a paper, "" when the corpus does not have it."""
    paper = paper_of(corpus, pmid)
    return paper.title if paper else ""


def paper_of(corpus: Path, pmid: str) -> Paper | None:
    """A paper of the corpus, if there is a corpus and it has it."""
    if not pmid.isdecimal():
        return None
    with CORPUS_LOCK:
        opened = opened_corpus(corpus.resolve())  # another version has another path
        return opened.find(pmid) if opened else None


@lru_cache(maxsize=1)
def opened_corpus(folder: Path) -> Corpus | None:
    """The corpus in a folder, None when there is none."""
    try:
        return Corpus(folder)
    except ArtifactError:
        return None
