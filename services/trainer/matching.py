"""When two answers are the same, and when a text holds an answer: one normaliser for all of it.

Normalisation is the field's (SQuAD, Search-R1): lower case, no punctuation, no articles, single spaces.
"""

import re
import string

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """The form in which answers are compared."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> bool:
    """Whether both normalise to the same non-empty text."""
    return normalise(answer) == normalise(gold) != ""


def contains(text: str, phrase: str) -> bool:
    """Whether `phrase` stands in `text` on word boundaries, both normalised; an empty phrase never does."""
    wanted = normalise(phrase)
    return wanted != "" and f" {wanted} " in f" {normalise(text)} "
