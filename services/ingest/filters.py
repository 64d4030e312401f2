"""Which papers enter the corpus: rules over one paper, each with the name under which what it drops is counted.

A paper that several rules would drop counts under the first: excluded, retracted, publication_type, language,
no_abstract, short_abstract. PubMed's languages are those of the article, and its abstracts are English nearly always,
so all languages enter unless some are named. A record that names no language (a file of titles and abstracts) is never
dropped for its language; when languages are asked for, such records are counted as `language_unknown`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from services.ingest.tally import drop
from shared.files import hash_json
from shared.pmids import read_pmids
from shared.records import Paper
from shared.settings import IngestSettings

NAMES = (
    "require_abstract", "min_abstract_words", "languages", "exclude_publication_types", "keep_retracted",
)  # fmt: skip


def excluded_pmids(ingest: IngestSettings) -> frozenset[str]:
    """The PMIDs that the settings leave out; UsageError when a file is missing or holds something else."""
    return read_pmids(ingest.exclude_pmids, "DRZERO_INGEST__EXCLUDE_PMIDS")


def filter_settings(ingest: IngestSettings, excluded: frozenset[str]) -> Mapping[str, Any]:
    """What of the filters shapes a corpus, for its manifest."""
    return {name: getattr(ingest, name) for name in NAMES} | {"exclude_pmids": hash_json(sorted(excluded))}


def why_dropped(paper: Paper, ingest: IngestSettings, excluded: frozenset[str]) -> str | None:
    """The reason for which a paper is left out, or None."""
    if paper.pmid in excluded:
        return "excluded"
    if paper.retracted and not ingest.keep_retracted:
        return "retracted"
    if ingest.exclude_publication_types and _meet(ingest.exclude_publication_types, paper.publication_types):
        return "publication_type"
    if ingest.languages and paper.languages and not _meet(ingest.languages, paper.languages):
        return "language"
    if not paper.abstract:
        return "no_abstract" if ingest.require_abstract else None
    if ingest.min_abstract_words and len(paper.abstract.split()) < ingest.min_abstract_words:
        return "short_abstract"
    return None


def kept(
    papers: Iterable[Paper], ingest: IngestSettings, excluded: frozenset[str], counts: Counter[str]
) -> Iterator[Paper]:
    """The papers that no rule drops; the others are counted by reason."""
    for paper in papers:
        reason = why_dropped(paper, ingest, excluded)
        if reason is not None:
            drop(counts, reason)
            continue
        if ingest.languages and not paper.languages:
            counts["language_unknown"] += 1
        yield paper


def _meet(some: Iterable[str], others: Iterable[str]) -> bool:
    """Whether a word is in both, whatever the case: PubMed also writes ENG and JOURNAL ARTICLE."""
    return not {word.strip().lower() for word in some}.isdisjoint(word.lower() for word in others)
