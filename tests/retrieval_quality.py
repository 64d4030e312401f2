"""How well searches find, on real judgements: `PYTHONPATH=. python tests/retrieval_quality.py scifact|pubmedqa`.

scifact: claims → the abstracts they cite, among 5,183: nDCG@10, recall@10 and @100; the share of the vectors is also
chosen on four fifths of the claims and judged on the last, five times over. pubmedqa: 1,000 questions → the paper each
was made from, among all records: recall@1 and @3, MRR, first as the papers are, then without the titles of those 1,000,
because nearly every question is its paper's title. Both: milliseconds a query, alone and in batches of 64.
p is the two-sided one of a paired randomisation test against the better of dense and bm25.

In: the folder of the data (--folder), settings of the environment. Out: tables in Markdown. With --keep FOLDER the
index is made there and found again the next time.
"""

import argparse
import ast
import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import structlog
from corpora import publish_corpus
from numpy.typing import NDArray

from services.retrieval.build import build
from services.retrieval.encoder import Begun
from services.retrieval.query import Mode, Query
from services.retrieval.ranking import Encodes, Parts, Ranker
from services.retrieval.search import Searcher
from shared.corpus import Corpus
from shared.records import Paper
from shared.settings import Settings, build_settings

DATA = Path(__file__).parents[2] / "shared" / "data"
DEPTH = 100
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7)
FOLDS = 5
ROUNDS = 20_000
BATCH = 64
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")

Fusion = Literal["scores", "ranks"]
Values = NDArray[np.float64]  # one a query
Found = list[list[str]]  # PMIDs of each query, best first
Measure = Callable[[Sequence[str], set[str]], float]
Measures = Sequence[tuple[str, Measure]]


class Way(NamedTuple):
    """One way to search."""

    name: str
    mode: Mode
    fusion: Fusion = "scores"
    rerank: bool = False


WAYS = (
    Way("dense", "dense"),
    Way("bm25", "bm25"),
    Way("hybrid, scores", "hybrid"),
    Way("hybrid, ranks", "hybrid", "ranks"),
)


class Judged(NamedTuple):
    """Queries and the PMIDs that each should find."""

    texts: list[str]
    right: list[set[str]]


class Remembered:
    """An encoder that encodes each text once."""

    def __init__(self, encoder: Any, texts: Sequence[str]) -> None:
        self._vectors = dict(zip(texts, encoder.encode(texts), strict=True))

    def encode(self, texts: Sequence[str], begun: Begun | None = None) -> NDArray[np.float32]:
        """The vectors of texts that were given before."""
        return np.stack([self._vectors[text] for text in texts])


# ---- data ------------------------------------------------------------------------------------------------------------


def scifact(folder: Path) -> tuple[list[Paper], Judged]:
    """All abstracts, with the document's number for a PMID, and the training claims."""
    papers = [
        Paper(row["doc_id"], row["title"], " ".join(ast.literal_eval(part).strip() for part in quoted(row["abstract"])))
        for row in rows_of(folder / "corpus.csv.gz")
    ]
    claims = {row["id"]: row for row in rows_of(folder / "claims_train.csv.gz")}  # a claim has a row for each evidence
    cited = [set(re.findall(r"\d+", row["cited_doc_ids"])) for row in claims.values()]
    return papers, Judged([row["claim"] for row in claims.values()], cited)


def quoted(abstract: str) -> list[str]:
    """The sentences of an abstract as numpy prints a list of strings: quoted, without commas."""
    return QUOTED.findall(abstract)


def rows_of(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a gzipped CSV file."""
    csv.field_size_limit(10**9)
    with gzip.open(path, "rt", encoding="utf-8", newline="") as stream:
        yield from csv.DictReader(stream)


def pubmedqa(folder: Path) -> Judged:
    """The labelled questions."""
    with gzip.open(folder / "ori_pqal.json.gz", "rt", encoding="utf-8") as stream:
        questions = json.load(stream)
    return Judged([item["QUESTION"] for item in questions.values()], [{pmid} for pmid in questions])


# ---- measures --------------------------------------------------------------------------------------------------------


def ndcg(found: Sequence[str], right: set[str], at: int = 10) -> float:
    """Normalised discounted cumulative gain of the first `at`, every right paper worth the same; in [0, 1]."""
    gains = 1 / np.log2(np.arange(2, at + 2))
    hits = [pmid in right for pmid in found[:at]]
    return float(gains[: len(hits)][hits].sum() / gains[: min(at, len(right))].sum())


def recall(found: Sequence[str], right: set[str], at: int) -> float:
    """Share of the right papers among the first `at`."""
    return len(right & set(found[:at])) / len(right)


def reciprocal_rank(found: Sequence[str], right: set[str]) -> float:
    """1 / rank of the first right paper; 0 when none is found."""
    return next((1 / rank for rank, pmid in enumerate(found, 1) if pmid in right), 0.0)


def p_value(ours: Values, theirs: Values) -> float:
    """Two-sided p of the mean difference under random signs of the paired differences."""
    apart = ours - theirs
    draw = np.random.default_rng(0)
    more = 0
    for _ in range(ROUNDS // 1000):
        signs = draw.choice([-1.0, 1.0], size=(1000, len(apart)))
        more += int((abs((signs * apart).mean(axis=1)) >= abs(apart.mean()) - 1e-12).sum())
    return (more + 1) / (ROUNDS + 1)


def of_each(measure: Measure, found: Found, judged: Judged) -> Values:
    """A measure of every query."""
    return np.array([measure(pmids, right) for pmids, right in zip(found, judged.right, strict=True)])


# ---- searches --------------------------------------------------------------------------------------------------------


class Bench:
    """One index, the judged queries, and what each way finds for them."""

    def __init__(self, settings: Settings, judged: Judged) -> None:
        self.judged, self._settings = judged, settings.retrieval
        self.searcher = Searcher(settings)
        self._pmids = [paper.pmid for paper in self.searcher.corpus]
        self._remembered = Remembered(self.searcher.encoder, judged.texts)

    def find(self, way: Way, share: float | None = None) -> Found:
        """The PMIDs that each query finds, best first."""
        queries = [Query(text, DEPTH, way.mode, rerank=way.rerank) for text in self.judged.texts]
        if way.rerank:
            return [[hit.paper.pmid for hit in hits] for hits in self.searcher.search_each(queries)]
        ranker = self._ranker(way, self._remembered, share)
        ranked = ranker.rank(queries, [DEPTH] * len(queries), ranker.encode(queries))
        return [[self._pmids[hit.row] for hit in hits] for hits in ranked]

    def milliseconds(self, way: Way, batch: int) -> float:
        """Median time of a query in batches of so many, without fetching papers; with them when they are reranked."""
        ranker = self._ranker(way, self.searcher.encoder)
        times = []
        for start in range(0, max(1, min(len(self.judged.texts), 20 * batch) - batch + 1), batch):
            queries = [Query(text, 3, way.mode, rerank=way.rerank) for text in self.judged.texts[start : start + batch]]
            started = time.perf_counter()
            if way.rerank:
                self.searcher.search_each(queries)
            else:
                ranker.rank(queries, [3] * len(queries), ranker.encode(queries))
            times.append((time.perf_counter() - started) / len(queries) * 1000)
        return float(np.median(times))

    def _ranker(self, way: Way, encoder: Encodes, share: float | None = None) -> Ranker:
        changed: dict[str, Any] = {"fusion": way.fusion} | ({} if share is None else {"dense_share": share})
        parts = Parts(encoder, self.searcher.index, self.searcher.words, self.searcher.filters)
        return Ranker(parts, self._settings.model_copy(update=changed))


def compare(bench: Bench, measures: Measures, ways: Sequence[Way]) -> None:
    """Print a table of all ways; the first measure is tested against the better of dense and bm25."""
    values = {way: [of_each(measure, bench.find(way), bench.judged) for _, measure in measures] for way in ways}
    better = max((values[way][0] for way in WAYS[:2]), key=lambda found: float(found.mean()))
    heads = [name for name, _ in measures]
    table_row("", *heads, f"{heads[0]} against the better", "p", "ms alone", f"ms in {BATCH}")
    table_row("---", *["---:"] * (len(heads) + 4))
    for way, found in values.items():
        apart = float(found[0].mean() - better.mean())
        tested = ("", "") if found[0] is better else (f"{apart:+.4f}", readable(p_value(found[0], better)))
        speed = (f"{bench.milliseconds(way, size):.2f}" for size in (1, BATCH))
        table_row(way.name, *(f"{part.mean():.4f}" for part in found), *tested, *speed)


def chosen_share(bench: Bench) -> None:
    """Print nDCG@10 for each share of the vectors, and of the share chosen without the claims that it is judged on."""
    way = WAYS[2]
    by_share = {share: of_each(ndcg, bench.find(way, share), bench.judged) for share in SHARES}
    folds = np.arange(len(bench.judged.texts)) % FOLDS
    judged = np.empty(len(folds))
    chosen = []
    for fold in range(FOLDS):
        best = max(SHARES, key=lambda share: float(by_share[share][folds != fold].mean()))
        judged[folds == fold] = by_share[best][folds == fold]
        chosen.append(best)
    print()
    table_row("share of the vectors", *map(str, SHARES), f"chosen in {FOLDS} folds")
    table_row("---", *["---:"] * (len(SHARES) + 1))
    means = (f"{values.mean():.4f}" for values in by_share.values())
    table_row("nDCG@10", *means, f"{judged.mean():.4f} (shares {', '.join(map(str, chosen))})")


def readable(p: float) -> str:
    """A p as it is usually told."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def table_row(*cells: str) -> None:
    """Print one row of a Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


# ---- commands --------------------------------------------------------------------------------------------------------


def run_scifact(folder: Path, work: Path, ways: Sequence[Way]) -> None:
    """SciFact's tables."""
    papers, judged = scifact(folder)
    settings = settings_in(work / "scifact")
    if not (work / "scifact" / "corpus").exists():
        publish_corpus(work / "scifact", papers, shard_rows=10_000)
    build(settings, structlog.get_logger())
    print(f"\n{len(judged.texts)} claims, {sum(map(len, judged.right))} judgements, {len(papers)} abstracts\n")
    bench = Bench(settings, judged)
    measures: Measures = [
        ("nDCG@10", ndcg),
        ("recall@10", partial(recall, at=10)),
        ("recall@100", partial(recall, at=100)),
    ]
    compare(bench, measures, ways)
    chosen_share(bench)


def run_pubmedqa(folder: Path, work: Path, ways: Sequence[Way]) -> None:
    """PubMedQA's tables, with and without the titles of the papers that are looked for."""
    judged = pubmedqa(folder)
    plain, untitled = settings_in(work / "pubmed"), settings_in(work / "untitled")
    if not (work / "pubmed" / "corpus").exists():
        ingest(folder.parent / "pubmed", work / "pubmed")
    build(plain, structlog.get_logger())
    if not (work / "untitled" / "corpus").exists():
        take_over_index(work / "pubmed", work / "untitled")
        wanted = set().union(*judged.right)
        corpus = Corpus(work / "pubmed" / "corpus")
        papers = [replace(paper, title="") if paper.pmid in wanted else paper for paper in corpus]
        publish_corpus(work / "untitled", papers, shard_rows=10_000)
    build(untitled, structlog.get_logger())
    measures: Measures = [
        ("recall@1", partial(recall, at=1)),
        ("recall@3", partial(recall, at=3)),
        ("MRR", reciprocal_rank),
    ]
    for name, settings in (("as they are", plain), ("without their titles", untitled)):
        bench = Bench(settings, judged)
        print(f"\n{len(judged.texts)} questions, {len(bench.searcher.corpus)} papers; those looked for {name}\n")
        compare(bench, measures, ways)


def settings_in(folder: Path) -> Settings:
    """The environment's settings with data in `folder`."""
    return build_settings({**os.environ, "DRZERO_STORAGE__DATA_DIR": str(folder)})


def ingest(xml: Path, folder: Path) -> None:
    """All records of the XML files as a corpus, those without an abstract and retracted ones, too."""
    asked = {"STORAGE__DATA_DIR": str(folder), "INGEST__XML_DIR": str(xml)}
    asked |= {"INGEST__REQUIRE_ABSTRACT": "false", "INGEST__KEEP_RETRACTED": "true"}
    environ = os.environ | {f"DRZERO_{name}": value for name, value in asked.items()}
    subprocess.run([sys.executable, "-m", "services.ingest"], env=environ, check=True, stdout=subprocess.DEVNULL)


def take_over_index(source: Path, target: Path) -> None:
    """Publish a copy of the index, so that the next build there embeds only what differs."""
    version = target / ".index.copied"
    shutil.copytree((source / "index").resolve(), version)
    (target / "index").symlink_to(version.name)


@contextmanager
def place(keep: Path | None) -> Iterator[Path]:
    """The folder for corpora and indexes."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("scifact", "pubmedqa"))
    parser.add_argument("--folder", type=Path, help="folder of the data set; beside it lies pubmed with the records")
    parser.add_argument("--keep", type=Path, help="where corpora and indexes are made and kept")
    options = parser.parse_args()
    more = [Way("hybrid, reranked", "hybrid", rerank=True)] if build_settings(os.environ).retrieval.rerank_model else []
    commands = {"scifact": run_scifact, "pubmedqa": run_pubmedqa}
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    with place(options.keep) as work:
        commands[options.data](options.folder or DATA / options.data, work, [*WAYS, *more])


if __name__ == "__main__":
    main()
