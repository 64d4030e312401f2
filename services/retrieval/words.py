"""Word search: BM25 over titles and abstracts, by tantivy. The only file that imports tantivy.

Row i of the index is row i of the corpus. Texts are split by `services.retrieval.terms`, for papers and queries alike,
and queries are sums over terms, never parsed, so no sign in them has a meaning. Files are tantivy's own, mapped into
memory. Equal scores are in the order of rows, also where a result is cut. Not thread-safe.
"""

import shutil
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Self
from weakref import finalize

import numpy as np

from services.retrieval.nearest import Mask, Rows
from services.retrieval.recipe import REMEDY
from services.retrieval.terms import terms
from shared.files import ArtifactError
from shared.records import Paper

FOLDER = "words"
TITLE_WEIGHT = 2  # a word of the title counts as often; measured on SciFact's training claims
WRITER_BYTES = 128_000_000  # what is written is flushed when it takes so much; splitting texts is the slow part
SPARE = 14  # hits beyond those asked for, which mostly show that no equal score is cut off
FEW_ROWS = 1024  # so many allowed rows are named in the query; of more, the best hits are sieved
QUERIES_KEPT = 512
META = "meta.json"
FREQUENCIES = "freq"  # no positions: phrases are not searched


def write_words(papers: Iterable[Paper], folder: Path) -> None:
    """Write the word index of all papers, in order, into an artifact's building folder; holds a bounded part of it."""
    WordIndex.write(papers, folder / FOLDER)


class WordIndex:
    """BM25 with k1 1.2 and b 0.75, which tantivy fixes."""

    def __init__(self, index: Any) -> None:
        self._schema, self._searcher = index.schema, index.searcher()
        self._query_for = lru_cache(maxsize=QUERIES_KEPT)(partial(_any_of, self._schema))  # hybrid asks twice

    @classmethod
    def write(cls, papers: Iterable[Paper], folder: Path) -> None:
        """Make the index in `folder`, which must not hold one already."""
        tantivy = _tantivy()
        folder.mkdir(parents=True)
        writer = _registered(tantivy.Index(_schema(), path=str(folder), reuse=False)).writer(WRITER_BYTES, 1)
        for row, paper in enumerate(papers):
            document = tantivy.Document()
            document.add_text("terms", " ".join(terms(paper.title) * TITLE_WEIGHT + terms(paper.abstract)))
            document.add_unsigned("row", row)
            writer.add_document(document)
        writer.commit()
        writer.wait_merging_threads()
        for unneeded in folder.glob(".*"):  # locks, and a list that only a writer reads
            unneeded.unlink()
        (folder / META).chmod(0o644)  # else nobody but its maker could read it

    @classmethod
    def read(cls, folder: Path) -> Self:
        """A written index, memory-mapped; ArtifactError when tantivy cannot read it."""
        # tantivy takes a lock in the folder that it opens, and an artifact never changes and may be on a disk that only
        # reads. So it gets a folder of links, which nobody needs once the files are mapped.
        links = Path(mkdtemp(prefix="words-"))
        remove = partial(shutil.rmtree, links, ignore_errors=True)
        try:
            index = cls(_opened(links, folder))
        finally:
            remove()
        finalize(index, remove)  # a thread of tantivy may have been making the lock again just then
        return index

    def __len__(self) -> int:
        return int(self._searcher.num_docs)

    def papers_with(self, term: str) -> int:
        """How many papers hold a term."""
        return int(self._searcher.doc_freq("terms", term))

    def search(self, text: str, top_k: int, allowed: Mask | None = None) -> Rows:
        """The best rows for a text, best first: at most top_k, only those that hold one of its words and are allowed.

        A word of the text counts once, however often it stands there.
        """
        query = self._query_for(text)
        if query is None or top_k <= 0:
            return []
        if allowed is None:
            return self._best(query, top_k)
        rows = int(np.count_nonzero(allowed))
        if rows <= FEW_ROWS:
            return self._among(query, np.flatnonzero(allowed).tolist())[:top_k]
        return self._best(query, top_k, allowed)

    def scores(self, text: str, rows: Sequence[int]) -> dict[int, float]:
        """The score of each row for a text; 0 for a row without any of its words."""
        query = self._query_for(text)
        found = {} if query is None else {row: score for score, row in self._among(query, rows)}
        return {row: found.get(row, 0.0) for row in rows}

    def _among(self, query: Any, rows: Sequence[int]) -> Rows:
        """The hits of a query among so many rows, all of them."""
        if not rows:
            return []
        query_of, occur = _tantivy().Query, _tantivy().Occur
        # Many small queries: tantivy's own query for a set of numbers takes five times as long.
        named = query_of.boolean_query([(occur.Should, _term(self._schema, "row", row)) for row in rows])
        both = [(occur.Must, query_of.const_score_query(named, 0.0)), (occur.Must, query)]
        return _ordered(self._hits(query_of.boolean_query(both), len(rows)))

    def _best(self, query: Any, top_k: int, allowed: Mask | None = None) -> Rows:
        """The best hits, asked for in growing numbers until all that might belong to them are there."""
        limit = min(top_k + SPARE, max(1, len(self)))
        while True:
            hits = self._hits(query, limit)
            kept = hits if allowed is None else [hit for hit in hits if allowed[hit[1]]]
            # Complete when all hits are there, or enough with a better score than the last, which may have equals.
            if len(hits) < limit or sum(score > hits[-1][0] for score, _ in kept) >= top_k:
                return _ordered(kept)[:top_k]
            limit *= 4

    def _hits(self, query: Any, limit: int) -> Rows:
        hits = self._searcher.search(query, limit=limit, count=False).hits
        rows = self._searcher.fast_field_values("row", [address for _, address in hits]) if hits else []
        return [(score, row) for (score, _), row in zip(hits, rows, strict=True)]


def _any_of(schema: Any, text: str) -> Any:
    """The query for papers with any word of a text; None when it has no words."""
    should = _tantivy().Occur.Should
    parts = [(should, _term(schema, "terms", term)) for term in dict.fromkeys(terms(text))]
    return _tantivy().Query.boolean_query(parts) if parts else None


def _term(schema: Any, field: str, value: str | int) -> Any:
    return _tantivy().Query.term_query(schema, field, value, index_option=FREQUENCIES)


def _ordered(hits: Rows) -> Rows:
    return sorted(hits, key=lambda hit: (-hit[0], hit[1]))


def _schema() -> Any:
    builder = _tantivy().SchemaBuilder()
    builder.add_text_field("terms", stored=False, tokenizer_name="spaces", index_option=FREQUENCIES)
    builder.add_unsigned_field("row", stored=False, indexed=True, fast=True)
    return builder.build()


def _opened(links: Path, folder: Path) -> Any:
    """The index of links to the files of `folder`, all of them open."""
    for path in folder.glob("*"):
        (links / path.name).symlink_to(path.resolve())
    try:
        index = _tantivy().Index.open(str(links))
        index.config_reader(reload_policy="manual")  # else it looks for new files, which never come
    except (ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArtifactError(f"{folder} is no word index that tantivy can read ({reason}); {REMEDY}") from error
    return _registered(index)


def _registered(index: Any) -> Any:
    tantivy = _tantivy()
    index.register_tokenizer("spaces", tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.whitespace()).build())
    return index


@cache
def _tantivy() -> Any:
    import tantivy

    return tantivy
