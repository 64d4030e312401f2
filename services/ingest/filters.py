"""Which papers enter the corpus: rules over one paper, each with the name under which what it drops is counted.

A paper that several rules would drop counts under the first: excluded, retracted, publication_type, language,
no_abstract, short_abstract. PubMed's languages are those of the article, and its abstracts are English nearly always,
so all languages enter unless some are named. A record that names no language (a file of titles and abstracts) is never
dropped for its language; when languages are asked for, such records are kept as `language_unknown`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from shared.files import hash_json
from shared.pmids import read_pmids
from shared.records import Paper
from shared.settings import IngestSettings

# Ledgers hold the position of a fate in this tuple: append only.
FATES = (
    "kept", "language_unknown", "excluded", "retracted", "publication_type", "language", "no_abstract",
    "short_abstract",
)  # fmt: skip
KEPT = frozenset({"kept", "language_unknown"})
NAMES = (
    "require_abstract", "min_abstract_words", "languages", "exclude_publication_types", "keep_retracted",
)  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """The filters of the settings, their files read; UsageError when one is missing or holds something else."""

    ingest: IngestSettings
    excluded: frozenset[str]

    @classmethod
    def of(cls, ingest: IngestSettings) -> "Rules":
        """The rules of these settings."""
        return cls(ingest, read_pmids(ingest.exclude_pmids, "DRZERO_INGEST__EXCLUDE_PMIDS"))

    @property
    def shape(self) -> dict[str, Any]:
        """What of them shapes a corpus, for its manifest."""
        excluded = hash_json(sorted(self.excluded))
        return {name: getattr(self.ingest, name) for name in NAMES} | {"exclude_pmids": excluded}


def fate(paper: Paper, rules: Rules) -> str:
    """What becomes of a paper, one of `FATES`."""
    ingest = rules.ingest
    if paper.pmid in rules.excluded:
        return "excluded"
    if paper.retracted and not ingest.keep_retracted:
        return "retracted"
    if ingest.exclude_publication_types and _meet(ingest.exclude_publication_types, paper.publication_types):
        return "publication_type"
    if ingest.languages and paper.languages and not _meet(ingest.languages, paper.languages):
        return "language"
    if not paper.abstract and ingest.require_abstract:
        return "no_abstract"
    if paper.abstract and ingest.min_abstract_words and len(paper.abstract.split()) < ingest.min_abstract_words:
        return "short_abstract"
    return "language_unknown" if ingest.languages and not paper.languages else "kept"


def _meet(some: Iterable[str], others: Iterable[str]) -> bool:
    """Whether a word is in both, whatever the case: PubMed also writes ENG and JOURNAL ARTICLE."""
    return not {word.strip().lower() for word in some}.isdisjoint(word.lower() for word in others)
