"""The words of a text as word search knows them: lower case, no accents, stemmed, compounds whole and in parts.

Papers and queries go through the same function, and an index names the version of it that it was made with, so the two
never differ. Pure but for a cache of stems; no I/O.
"""

import re
import unicodedata
from functools import lru_cache
from typing import Any

TERMS_VERSION = 1  # raised when `terms` gives other words for any text; older indices are then made again

# Lucene's English stop words without "no" and "not", which a claim may turn on.
STOP_WORDS = """
a an and are as at be but by for if in into is it of on or such that the their then there these they this to was will
with
"""
STOP = frozenset(STOP_WORDS.split())
GREEK_NAMES = """
alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma sigma tau upsilon phi chi
psi omega
"""
GREEK = str.maketrans(dict(zip("αβγδεζηθικλμνξοπρςστυφχψω", GREEK_NAMES.split(), strict=True)))
# Possessive, because a word that begins no compound would otherwise be tried again from each of its letters.
TOKEN = re.compile(r"\w++(?:[-\u2010-\u2013]\w++)*+")
RUN = re.compile(r"\d+|[^\W\d_]+")
DASH = re.compile(r"[-\u2010-\u2013]")
LONGEST_JOINED = 12  # letters of a compound that is one word, too: il6 for IL-6, not meta-analysis-based
LONGEST_TERM = 64  # letters that count; what is longer is a sequence or a blunder
WORDS_KEPT = 1 << 16


def terms(text: str) -> list[str]:
    """The words of a text, repeated ones repeated; [] for a text of stop words or signs.

    "IL-6" and "IL6" give il, 6 and il6, so that both find each other and "IL 6"; so do "5 mg" and "5mg". A Greek letter
    gives its name.
    """
    found: list[str] = []
    for token in TOKEN.findall(plain(text)):
        parts = DASH.split(token)
        for part in parts:
            if part not in STOP:
                found.append(stem(part))
                found += _pieces(part)
        if len(parts) > 1 and len(token) < LONGEST_JOINED + len(parts):
            found.append("".join(parts))
    return found


@lru_cache(maxsize=WORDS_KEPT)
def _pieces(word: str) -> tuple[str, ...]:
    """The runs of letters and of digits in a short word that has both; else none."""
    if len(word) > LONGEST_JOINED or word.isalpha() or word.isdecimal():
        return ()
    runs = RUN.findall(word)
    return tuple(stem(run) for run in runs if run not in STOP) if len(runs) > 1 else ()


def plain(text: str) -> str:
    """Lower case, accents off, wide forms and superscripts plain, Greek letters by name."""
    if text.isascii():
        return text.lower()
    apart = unicodedata.normalize("NFKD", text).casefold().translate(GREEK)
    return apart if apart.isascii() else "".join(letter for letter in apart if not unicodedata.combining(letter))


@lru_cache(maxsize=WORDS_KEPT)
def stem(word: str) -> str:
    """The Snowball stem of a plain English word."""
    stemmed: str = _stemmer().stemWord(word[:LONGEST_TERM])
    return stemmed


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    import Stemmer  # type: ignore[import-not-found] # compiled, without stubs

    return Stemmer.Stemmer("english", 0)  # its own cache is slower than ours
