"""Questions with known answers that nothing here was trained on: PubMedQA, BioASQ, and sets of a user's own.

`trainer.evaluation.sets` names files, plain or .gz, whose form is seen from their content:

- PubMedQA's `ori_pqal.json`: {pmid: {"QUESTION", "final_decision": yes | no | maybe, …}}
- BioASQ's training and test files: {"questions": [{"id", "body", "type", "exact_answer", "documents", …}]}; questions
  of the types yesno and factoid count, those that want a list or a summary do not; their papers are those whose PubMed
  address stands in `documents` or `snippets`
- JSON lines of one's own: {"question", "answers": [text, …]} and, if there are, "id", "pmid" (the paper that it was
  written from, which becomes no seed) and "choices" (the answers among which one must be chosen; one is right)
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from services.trainer.matching import normalise
from shared.command import UsageError
from shared.settings import EvaluationSettings

VARIABLE = "DRZERO_TRAINER__EVALUATION__SETS"
KEPT_OUT = "kept_out"  # the set of the run's own questions
SAFETY = "safety"  # the prompts of safety.py
PUBMEDQA_CHOICES = ("yes", "no", "maybe")
BIOASQ_CHOICES = ("yes", "no")
PUBMED_ADDRESS = re.compile(r"(?:/pubmed/|pubmed\.ncbi\.nlm\.nih\.gov/)0*([1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Item:
    """A question of an evaluation set. With `choices` its one answer is among them."""

    set_name: str  # the file's name without endings
    id: str
    question: str
    answers: tuple[str, ...]  # any of them is right
    choices: tuple[str, ...] = ()
    papers: tuple[str, ...] = ()  # PMIDs of the papers that it is about


def evaluation_items(evaluation: EvaluationSettings) -> list[Item]:
    """The questions of all sets, each set in its file's order; UsageError for a file that cannot be read."""
    taken = Counter([KEPT_OUT, SAFETY, *map(set_name, evaluation.sets)])
    for path in evaluation.sets:
        if taken[set_name(path)] > 1:
            raise UsageError(
                f"expected {path} of {VARIABLE} to have a name of its own, found another set {set_name(path)}; "
                "rename the file"
            )
    return [item for path in evaluation.sets for item in read_set(path)]


def set_name(path: Path) -> str:
    """The name of the set in a file."""
    return path.name.split(".")[0]


@cache
def read_set(path: Path) -> tuple[Item, ...]:
    """The questions of one file; UsageError when it is missing, of no known form, or empty."""
    if not path.is_file():
        raise UsageError(f"expected the file {path} of {VARIABLE}, found none; mend the path")
    try:
        items = tuple(items_of(text_of(path), set_name(path)))
        require_usable(items)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, zlib.error) as error:
        raise UsageError(
            f"expected {path} of {VARIABLE} to be PubMedQA's or BioASQ's JSON, or JSON lines with question and "
            f"answers, found something else ({type(error).__name__}: {error}); mend the file or take it out"
        ) from error
    if not items:
        raise UsageError(f"expected questions in {path} of {VARIABLE}, found none; mend the file or take it out")
    return items


def text_of(path: Path) -> str:
    """The text of a file, unpacked when its name ends with .gz."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")


def items_of(text: str, name: str) -> Iterator[Item]:
    """The questions in the text of a file of any of the three forms."""
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None  # several lines
    if isinstance(whole, dict) and isinstance(whole.get("questions"), list):
        return bioasq_items(whole["questions"], name)
    if isinstance(whole, dict) and "question" not in whole:
        return pubmedqa_items(whole, name)
    return own_items([json.loads(line) for line in text.split("\n") if line.strip()], name)


def pubmedqa_items(records: Mapping[str, Mapping[str, Any]], name: str) -> Iterator[Item]:
    """The labelled questions of PubMedQA; the key of each is the PMID of its paper."""
    for pmid, record in records.items():
        answer = record["final_decision"]
        if answer not in PUBMEDQA_CHOICES:
            raise ValueError(f"the final_decision of {pmid} is {answer!r}")
        yield Item(name, pmid, record["QUESTION"], (answer,), PUBMEDQA_CHOICES, (pmid,))


def bioasq_items(records: Sequence[Mapping[str, Any]], name: str) -> Iterator[Item]:
    """The questions of BioASQ that have one short answer."""
    for record in records:
        exact, papers = record.get("exact_answer"), bioasq_papers(record)
        if record["type"] == "yesno" and exact:
            answer = str(exact if isinstance(exact, str) else exact[0]).lower()
            yield Item(name, str(record["id"]), record["body"], (answer,), BIOASQ_CHOICES, papers)
        elif record["type"] == "factoid" and exact:
            # A list of answers, each a text or the list of its synonyms.
            answers = [exact] if isinstance(exact, str) else exact
            texts = [text for one in answers for text in ([one] if isinstance(one, str) else one)]
            yield Item(name, str(record["id"]), record["body"], tuple(texts), papers=papers)


def bioasq_papers(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The PMIDs in a BioASQ question's documents and snippets; an address that is none of PubMed's has none."""
    addresses = [*record.get("documents", []), *(snippet["document"] for snippet in record.get("snippets", []))]
    return tuple(dict.fromkeys(pmid for address in addresses for pmid in PUBMED_ADDRESS.findall(address)))


def own_items(records: Sequence[Mapping[str, Any]], name: str) -> Iterator[Item]:
    """The questions of a user's own set."""
    for number, record in enumerate(records, start=1):
        given = {key: value for key, value in record.items() if value is not None}
        answers, choices = given["answers"], given.get("choices", [])
        if not isinstance(answers, list) or not isinstance(choices, list):
            raise TypeError(f"the answers or choices of question {number} are no list")
        papers = (str(given["pmid"]),) if "pmid" in given else ()
        yield Item(name, str(given.get("id", number)), given["question"], tuple(answers), tuple(choices), papers)


def require_usable(items: Sequence[Item]) -> None:
    """Raise ValueError when a question cannot be asked or marked, or two have one id."""
    for item in items:
        texts = (item.question, *item.answers, *item.choices)
        if not item.answers or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"question {item.id} lacks a text")
        if item.choices and (len(item.answers) != 1 or item.answers[0] not in item.choices):
            raise ValueError(f"the one answer of question {item.id} is not among its choices")
        # As answers are compared, "A" is an article and nothing else.
        if len({normalise(choice) for choice in item.choices} - {""}) < len(item.choices):
            raise ValueError(f"the choices of question {item.id} differ only in case, articles or punctuation")
    twice = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise ValueError(f"several questions have the id {twice[0]}")
