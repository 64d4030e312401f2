"""The sentence of an abstract that fits a query best: the one that holds most of its words, weighted by rarity.

Pure functions of plain values. Sentences are split by the habits of abstracts (species, units, citations, labels in
capitals); general splitters that were tried broke two to four of the eight texts that the tests hold for it.
"""

import re
from collections.abc import Mapping

from services.retrieval.terms import terms

# A possible end: its sign, a citation, what closes, blanks, and then something that a sentence may begin with.
END = re.compile(
    r"[.!?];?(?:\[\d[\d,\s–-]*\]|\(\d[\d,\s–-]*\))?[\"'”’)\]]*\s+"
    r"(?=[\"'“‘(\[]*(?:[A-Z0-9\u0370-\u03FF\u00C0-\u00DE]|[a-z]{1,3}[A-Z0-9]))"
)
# After these a sentence goes on, whatever follows; after those of NUMBERED only when a number follows.
SHORTENED = "al approx ca cf dr e.g eq fig figs i.e mr mrs ms prof ref refs resp st viz vs"
GOES_ON = frozenset(SHORTENED.split())
NUMBERED = frozenset({"no", "nos", "p", "pp", "vol", "ver"})
DOTTED = re.compile(r"(?:[A-Z]\.)+[A-Z]")  # U.S, N.Y
INITIAL = re.compile(r"[A-Z]")
BEFORE_A_NAME = re.compile(r"(?:^|[A-Z]\S*|by|and|of)$")


def best_sentence(abstract: str, weights: Mapping[str, float]) -> str:
    """The sentence with the largest sum of weights of the terms it holds, the first of equals; "" if none holds any."""
    best, most = "", 0.0
    for sentence in sentences(abstract):
        found = sum(weights[term] for term in weights.keys() & set(terms(sentence)))
        if found > most:
            best, most = sentence, found
    return best


def sentences(text: str) -> list[str]:
    """The sentences of a text in order, without blanks around them; nothing else is lost."""
    found: list[str] = []
    start = 0
    for end in END.finditer(text):
        if _goes_on(text[start : end.start()], text[end.start()], text[end.end()]):
            continue
        found.append(text[start : end.end()].strip())
        start = end.end()
    last = text[start:].strip()
    return [*found, last] if last else found


def _goes_on(before: str, sign: str, following: str) -> bool:
    """Whether a dot belongs to a shortened word or an initial, given the sentence so far and the next character."""
    if sign != ".":
        return False
    rest, _, word = before.rpartition(" ")
    word = word.lstrip("([\"'“‘")
    if INITIAL.fullmatch(word):  # "vitamin A. Patients" ends, "J. Doe" does not
        return BEFORE_A_NAME.search(rest.rpartition(" ")[2]) is not None
    lower = word.lower()
    return (
        lower in GOES_ON
        or DOTTED.fullmatch(word) is not None
        or (following.isdigit() and (lower in NUMBERED or ("." in lower and lower.replace(".", "").isalpha())))
    )
