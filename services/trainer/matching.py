"""When two answers are the same, and when a text holds an answer: one normaliser for all of it.

Normalisation is the field's (SQuAD, Search-R1): lower case, no punctuation, no articles, single spaces. `exact_match`
on it is the reported number. `synonymous` is the biomedical variant: equal after writing in one way what `forms.py`
lists, and nothing else.

Citations ("PMID 123") belong to no answer: they are scored apart and taken off before any comparison.
"""

import re
import string

from services.trainer.forms import ARTICLES, one_form

PUNCTUATION = str.maketrans("", "", string.punctuation)

_LABEL = r"(?<![A-Za-z0-9])(?:PMID|PubMed\s?ID)"
_NUMBER = r"[\s:#=]{0,4}[0-9]{1,9}(?![0-9])"
_AND = r"\s{0,3}(?:[,;&/]\s{0,3}and\b|[,;&/]|\band\b)\s{0,3}"
# One citation or a list. A bare number goes on with the list after "PMIDs", and after "PMID" when it has 5 digits or
# more: in "PMID 123, 45 patients" the patients are not cited.
CITATION = re.compile(
    rf"{_LABEL}s{_NUMBER}(?:{_AND}[0-9]{{1,9}}(?![0-9]))*|{_LABEL}{_NUMBER}(?:{_AND}[0-9]{{5,9}}(?![0-9]))*",
    re.IGNORECASE,
)
CITATIONS = re.compile(
    rf"(?:{CITATION.pattern})(?:(?:{_AND}|\s{{0,3}})(?:{CITATION.pattern}))*",
    re.IGNORECASE,
)
EMPTY_BRACKETS = re.compile(r"[(\[{][\s,;]{0,4}(?:see|cf\.?|e\.g\.,?)?[\s,;]{0,4}[)\]}]", re.IGNORECASE)
LEFT_BEHIND = re.compile(r"[\s,;]{1,4}(?=[)\]}])|(?<=[(\[{])[\s,;]{1,4}|\s(?=[.,;:!?](?:\s|$))")


def normalise(text: str) -> str:
    """The form in which answers are compared."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def cited_pmids(text: str) -> tuple[str, ...]:
    """The PMIDs that a text cites ("PMID 1", "(PMID:1, PMID 2)", "PMIDs 1 and 2"), in order, each once."""
    numbers = (number for found in CITATION.finditer(text) for number in re.findall(r"[0-9]+", found[0]))
    return tuple(dict.fromkeys(numbers))


def strip_citations(text: str) -> str:
    """The text without its citations and the brackets, commas and spaces that they leave; unchanged without any."""
    while CITATION.search(text) is not None:  # what is left may close up to one more
        bare = EMPTY_BRACKETS.sub(" ", CITATIONS.sub(" ", text))
        text = LEFT_BEHIND.sub("", re.sub(r"\s+", " ", bare)).strip(" ,;:")
    return text


def exact_match(answer: str, gold: str) -> bool:
    """Whether both normalise to the same non-empty text; citations do not count."""
    return _comparable(answer) == _comparable(gold) != ""


def contains(text: str, phrase: str) -> bool:
    """Whether `phrase` stands in `text` on word boundaries, both normalised; an empty phrase never does."""
    wanted = _comparable(phrase)
    return wanted != "" and f" {wanted} " in f" {_comparable(text)} "


def synonymous(answer: str, gold: str) -> bool:
    """Whether both are the same by the list at the top of `forms.py`; an exact match is, an empty text never.

    Reflexive on texts that say something, and symmetric.
    """
    if not _comparable(answer) or not _comparable(gold):
        return False
    return exact_match(answer, gold) or one_form(strip_citations(answer)) == one_form(strip_citations(gold)) != ""


def match_credit(answer: str, gold: str, synonym_credit: float) -> float:
    """1 for an exact match, `synonym_credit` for an answer that is only synonymous, else 0."""
    if exact_match(answer, gold):
        return 1.0
    return synonym_credit if synonymous(answer, gold) else 0.0


def _comparable(text: str) -> str:
    return normalise(strip_citations(text))
