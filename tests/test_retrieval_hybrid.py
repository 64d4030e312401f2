"""Vectors and words together: one order whatever the batch, filters in every mode, and what the default mode finds.

`hard_queries.jsonl` holds queries that one kind of search often misses (gene aliases, abbreviations, numbers, Greek
letters, hyphens, negation), each with its paper, decoys, and the rank within which the default mode finds the paper
among all of them and the demo records. A paraphrase that shares no word with its paper is the one beyond rank 3.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from corpora import publish_corpus
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from retrieval_world import PAPERS, needs_minilm, settings_for

from services.retrieval.build import build
from services.retrieval.encoder import Begun
from services.retrieval.filters import FilterIndex, write_filters
from services.retrieval.flat_index import FlatIndex
from services.retrieval.fusion import best_first, reciprocal_ranks, relative_sum
from services.retrieval.highlights import sentences
from services.retrieval.index import VectorIndex
from services.retrieval.nearest import inner_products
from services.retrieval.query import Filters, Mode, Query
from services.retrieval.ranking import Parts, Ranked, Ranker
from services.retrieval.rerank import NoReranker
from services.retrieval.search import Searcher, row_of
from services.retrieval.words import WordIndex, write_words
from shared.corpus import Corpus, write_books
from shared.files import ArtifactError
from shared.metrics import metrics_text
from shared.records import Hit, Paper
from shared.settings import RetrievalSettings, Settings

HARD = [json.loads(line) for line in Path(__file__).with_name("hard_queries.jsonl").read_text("utf-8").splitlines()]
DEMO = Path(__file__).parents[1] / "services" / "ingest" / "demo_records.jsonl"
MODES: tuple[Mode, ...] = ("dense", "bm25", "hybrid")
WORDS = ["sepsis", "gout", "asthma", "melanoma", "lithium", "aspirin", "warfarin", "insulin", "statin", "placebo"]
DIM = 16


# ---- fusion ----------------------------------------------------------------------------------------------------------

SCORES = st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 50)), min_size=1, max_size=12)


@given(SCORES, st.floats(0, 1))
def test_relative_scores_are_at_most_one_and_follow_both_searches(
    pairs: list[tuple[float, float]], share: float
) -> None:
    dense, words = (np.array(side) for side in zip(*pairs, strict=True))
    fused = relative_sum(dense, words, dense_share=share)
    assert (fused <= 1 + 1e-9).all()
    for one in range(len(pairs)):
        for other in range(len(pairs)):
            if dense[one] >= dense[other] and words[one] >= words[other]:
                assert fused[one] >= fused[other] - 1e-12


def test_a_search_that_finds_nothing_adds_nothing() -> None:
    dense = np.array([0.8, 0.4])
    assert relative_sum(dense, np.zeros(2), dense_share=0.5).tolist() == [0.5, 0.25]
    assert relative_sum(-dense, np.array([2.0, 1.0]), dense_share=0.5).tolist() == [0.5, 0.25]
    assert relative_sum(np.empty(0), np.empty(0), dense_share=0.5).tolist() == []


def test_reciprocal_ranks_are_those_of_the_formula() -> None:
    rows = np.array([2, 5, 7])
    scores = reciprocal_ranks(rows, np.array([7, 2]), np.array([5, 7]), dense_share=0.25)
    assert scores.tolist() == pytest.approx([0.25 / 62, 0.75 / 61, 0.25 / 61 + 0.75 / 62])


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 99)), unique_by=lambda pair: pair[1]))
def test_equal_scores_are_in_the_order_of_rows(pairs: list[tuple[float, int]]) -> None:
    scores, rows = np.array([score for score, _ in pairs]), np.array([row for _, row in pairs], dtype=np.int64)
    order = best_first(scores, rows, 5)
    assert [pairs[place] for place in order] == sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:5]


# ---- ranking, without a model ----------------------------------------------------------------------------------------


class DigestEncoder:
    """Vectors drawn from each text's digest; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str], begun: Begun | None = None) -> NDArray[np.float32]:
        self.asked += texts
        return np.stack([vector_of(text) for text in texts])


def vector_of(text: str) -> NDArray[np.float32]:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).normal(size=DIM).astype(np.float32)
    made: NDArray[np.float32] = vector / np.linalg.norm(vector)
    return made


def made_papers(count: int) -> list[Paper]:
    """Papers of a few words, every fifth the same as the one before."""
    draw = np.random.default_rng(1)
    papers: list[Paper] = []
    for row in range(count):
        text = papers[-1].text if row % 5 == 4 else " ".join(draw.choice(WORDS, 6))
        title, _, abstract = text.partition(" ")
        kind = ("Review",) if row % 3 else ("Letter", "Journal Article")
        papers.append(Paper(str(row), title, abstract, pub_date=str(1990 + row % 30), publication_types=kind))
    return papers


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("index")
    papers = made_papers(300)
    write_words(papers, folder)
    write_filters(papers, folder)
    stored = np.stack([vector_of(paper.text) for paper in papers])
    vectors = VectorIndex(stored, FlatIndex(stored))
    return Parts(DigestEncoder(), vectors, WordIndex.read(folder / "words"), FilterIndex.read(folder / "filters"))


def rank(parts: Parts, queries: Sequence[Query], **settings: Any) -> list[list[Ranked]]:
    ranker = Ranker(parts, RetrievalSettings(**settings))
    return ranker.rank(queries, [query.top_k for query in queries], ranker.encode(queries))


QUERIES = [
    Query(text, top_k, mode, filters=filters)
    for text in ("gout lithium", "aspirin in sepsis", "statin statin", "?", "zebra")
    for top_k in (1, 3, 60, 1000)
    for mode in MODES
    for filters in (Filters(), Filters(year_from=2000, publication_types=("letter",)), Filters(year_to=1950))
]


@pytest.mark.parametrize("fusion", ["scores", "ranks"])
def test_a_query_finds_the_same_alone_and_among_all_others(parts: Parts, fusion: str) -> None:
    together = rank(parts, QUERIES, fusion=fusion)
    assert [rank(parts, [query], fusion=fusion)[0] for query in QUERIES] == together
    assert rank(parts, QUERIES[::-1], fusion=fusion) == together[::-1]


@pytest.mark.parametrize("mode", MODES)
def test_fewer_wanted_is_the_beginning_of_more(parts: Parts, mode: Mode) -> None:
    longest = rank(parts, [Query("gout lithium", 50, mode)])[0]
    for top_k in (1, 2, 10, 49):
        assert rank(parts, [Query("gout lithium", top_k, mode)])[0] == longest[:top_k]


@pytest.mark.parametrize("fusion", ["scores", "ranks"])
def test_hybrid_scores_every_candidate_by_both_searches(parts: Parts, fusion: str) -> None:
    (found,) = rank(parts, [Query("gout lithium", 50, "hybrid")], fusion=fusion)
    rows = [hit.row for hit in found]
    exact = inner_products(parts.vectors.vectors(np.array(rows)), vector_of("gout lithium"))
    assert [hit.dense for hit in found] == exact.tolist()
    by_words = parts.words.scores("gout lithium", rows)
    assert [hit.bm25 for hit in found] == [by_words[row] for row in rows]
    assert found == sorted(found, key=lambda hit: (-hit.score, hit.row))


def test_one_search_alone_gives_its_own_scores(parts: Parts) -> None:
    dense, worded = rank(parts, [Query("gout lithium", 20, "dense"), Query("gout lithium", 20, "bm25")])
    assert [(hit.score, hit.bm25) for hit in dense] == [(hit.dense, None) for hit in dense]
    assert [(hit.score, hit.dense) for hit in worded] == [(hit.bm25, None) for hit in worded]
    assert [(hit.score, hit.row) for hit in worded] == parts.words.search("gout lithium", 20)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_all_or_nothing_is_one_search(parts: Parts, share: float) -> None:
    mode: Mode = "dense" if share else "bm25"
    hybrid, alone = rank(
        parts, [Query("gout lithium", 30, "hybrid"), Query("gout lithium", 30, mode)], dense_share=share
    )
    assert [hit.row for hit in hybrid] == [hit.row for hit in alone]


@pytest.mark.parametrize("filters", [Filters(year_from=2000), Filters(publication_types=("Letter",), year_to=2003)])
def test_a_filter_gives_the_best_of_what_it_allows(parts: Parts, filters: Filters) -> None:
    allowed = parts.filters.allowed(filters)
    assert allowed is not None
    every = {mode: rank(parts, [Query("gout lithium", 300, mode)])[0] for mode in MODES}
    for mode in MODES:
        (found,) = rank(parts, [Query("gout lithium", 300, mode, filters=filters)])
        if mode == "hybrid":
            assert {hit.row for hit in found} == {hit.row for hit in every[mode] if allowed[hit.row]}
        else:
            assert found == [hit for hit in every[mode] if allowed[hit.row]]


@pytest.mark.parametrize("mode", MODES)
def test_an_unknown_name_allows_nothing(parts: Parts, mode: Mode) -> None:
    assert rank(parts, [Query("gout", 5, mode, filters=Filters(mesh_terms=("no such term",)))]) == [[]]


def test_more_than_there_is_gives_each_paper_once(parts: Parts) -> None:
    for mode in ("dense", "hybrid"):
        (found,) = rank(parts, [Query("gout", 1000, mode)])
        assert sorted(hit.row for hit in found) == list(range(300))


def test_words_that_no_paper_has_leave_hybrid_to_the_vectors(parts: Parts) -> None:
    hybrid, dense = rank(parts, [Query("zebra", 20, "hybrid"), Query("zebra", 20, "dense")])
    assert [(hit.row, hit.dense, hit.bm25) for hit in hybrid] == [(hit.row, hit.dense, 0.0) for hit in dense]


def test_texts_are_encoded_once_and_only_for_the_vectors(parts: Parts) -> None:
    encoder = DigestEncoder()
    queries = [Query("gout", 3, "bm25"), Query("sepsis", 3, "dense"), Query("sepsis", 9, "hybrid")]
    rank(parts._replace(encoder=encoder), queries)
    assert encoder.asked == ["sepsis"]
    rank(parts._replace(encoder=encoder), queries[:1])
    assert encoder.asked == ["sepsis"]


# ---- the searcher ----------------------------------------------------------------------------------------------------


def demo_papers() -> list[Paper]:
    records = [json.loads(line) for line in DEMO.read_text("utf-8").splitlines()]
    return [Paper(str(30_001 + row), item["title"], item["abstract"]) for row, item in enumerate(records)]


def hard_papers() -> list[Paper]:
    """The paper of query i with PMID 10001 + i; decoys from 20001 on."""
    wanted = [Paper(str(10_001 + row), case["title"], case["abstract"]) for row, case in enumerate(HARD)]
    decoys = [decoy for case in HARD for decoy in case["decoys"]]
    return wanted + [Paper(str(20_001 + row), title, abstract) for row, (title, abstract) in enumerate(decoys)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("data")
    publish_corpus(folder, [*PAPERS, *hard_papers(), *demo_papers()])
    made = settings_for(folder, RETRIEVAL__ENCODER__MAX_TOKENS="256")
    build(made, structlog.get_logger())
    return made


@pytest.fixture(scope="module")
def searcher(built: Settings) -> Searcher:
    return Searcher(built)


def ranks(searcher: Searcher, texts: Sequence[str], wanted: Sequence[str], mode: Mode) -> list[int]:
    """The rank of each text's paper; 1000 when it is not among the first 100."""
    found = searcher.search_each([Query(text, 100, mode) for text in texts])
    lists = [[hit.paper.pmid for hit in hits] for hits in found]
    return [pmids.index(pmid) + 1 if pmid in pmids else 1000 for pmids, pmid in zip(lists, wanted, strict=True)]


@needs_minilm
@pytest.mark.parametrize(("place", "case"), list(enumerate(HARD)), ids=[case["query"] for case in HARD])
def test_a_hard_query_finds_its_paper(searcher: Searcher, place: int, case: dict[str, Any]) -> None:
    hits = searcher.search([case["query"]], case["within"])[0]
    assert str(10_001 + place) in [hit.paper.pmid for hit in hits]


@needs_minilm
def test_the_default_finds_hard_papers_better_than_each_search_alone(searcher: Searcher) -> None:
    wanted = [str(10_001 + place) for place in range(len(HARD))]
    found = {mode: ranks(searcher, [case["query"] for case in HARD], wanted, mode) for mode in MODES}
    mean = {mode: float(np.mean([1 / rank for rank in found[mode]])) for mode in MODES}
    assert mean["hybrid"] > max(mean["dense"], mean["bm25"])
    assert sum(rank <= 3 for rank in found["hybrid"]) >= len(HARD) - 1


@needs_minilm
def test_a_demo_record_is_found_by_its_title_and_by_a_sentence_of_it(searcher: Searcher) -> None:
    demo = demo_papers()
    pmids = [paper.pmid for paper in demo]
    by_title = ranks(searcher, [paper.title for paper in demo], pmids, "hybrid")
    by_sentence = ranks(searcher, [sentences(paper.abstract)[-1] for paper in demo], pmids, "hybrid")
    assert np.mean([rank == 1 for rank in by_title]) >= 0.97
    assert np.mean([rank <= 3 for rank in by_sentence]) >= 0.99


@needs_minilm
def test_the_library_call_follows_the_settings(searcher: Searcher, built: Settings) -> None:
    texts = ["metformin in sepsis", "gout", "metformin in sepsis"]
    default = searcher.search(texts)
    assert [len(hits) for hits in default] == [3, 3, 3]
    assert default == searcher.search_each([Query.plain(text, built.retrieval) for text in texts])
    assert default == searcher.search_each([Query(text, 3, "hybrid") for text in texts])
    assert searcher.search(texts, 7)[0][:3] == default[0] == default[2]
    assert searcher.search([]) == []
    assert default[0][0].paper.title == "Metformin in sepsis"


@needs_minilm
def test_another_fusion_needs_no_other_index(built: Settings, searcher: Searcher) -> None:
    changed = built.model_copy(update={"retrieval": built.retrieval.model_copy(update={"fusion": "ranks"})})
    hits = Searcher(changed).search(["metformin in sepsis"])[0]
    assert hits[0].paper.title == "Metformin in sepsis"
    assert hits[0].score == pytest.approx(1 / 61)


@needs_minilm
def test_similar_papers_are_the_nearest_without_the_paper_itself(searcher: Searcher) -> None:
    paper = PAPERS[3]
    hits = searcher.similar(paper.pmid, 5)
    assert hits is not None
    assert len(hits) == 5
    assert paper.pmid not in [hit.paper.pmid for hit in hits]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert all(hit.dense == hit.score for hit in hits)
    assert searcher.similar("99999999", 5) is None
    assert searcher.similar("no number", 5) is None
    everything = searcher.similar(paper.pmid, 10_000)
    assert everything is not None
    assert len(everything) == len(searcher.corpus) - 1


@pytest.mark.parametrize("dead", [set(), {0}, {8}, {0, 1, 2, 4}, set(range(9))])
def test_a_row_is_counted_without_the_dead_ones_before_it(dead: set[int], tmp_path: Path) -> None:
    publish_corpus(tmp_path, [Paper(str(pmid), "T", "A") for pmid in range(1, 10)], 4)
    folder = (tmp_path / "corpus").resolve()
    write_books(folder, Corpus(folder).ledger.only(np.array([row not in dead for row in range(9)])), 9)
    corpus = Corpus(folder)
    rows = {pmid: row_of(corpus, pmid) for pmid in map(str, range(1, 10))}
    assert {pmid: row for pmid, row in rows.items() if row is not None} == {
        paper.pmid: row for row, paper in enumerate(corpus)
    }
    assert row_of(corpus, "10") is row_of(corpus, "no number") is None


@needs_minilm
def test_a_highlight_is_a_sentence_of_the_abstract(searcher: Searcher) -> None:
    queries = [Query("patients treated with metformin", 5, mode, highlight=True) for mode in MODES]
    for hits in searcher.search_each([*queries, Query("gout", 5, "hybrid")])[:3]:
        assert all(hit.highlight in hit.paper.abstract for hit in hits)
        assert any(hit.highlight for hit in hits)
    assert all(not hit.highlight for hit in searcher.search(["gout"])[0])
    (nothing,) = searcher.search_each([Query("zebra", 2, "dense", highlight=True)])
    assert [hit.highlight for hit in nothing] == ["", ""]


@needs_minilm
def test_info_is_json_and_the_stages_are_metrics(searcher: Searcher) -> None:
    told = json.loads(json.dumps(searcher.info()))
    assert told["corpus"]["papers"] == told["index"]["rows"] == len(searcher.corpus)
    assert told["index"]["identity"] == searcher.manifest.identity
    searcher.search_each([Query("gout", 3, "hybrid", highlight=True)])
    text = metrics_text()[0].decode()
    for stage in ("encode", "search", "words", "fuse", "fetch", "highlight"):
        assert f'drzero_retrieval_stage_seconds_count{{stage="{stage}"}}' in text


@needs_minilm
def test_a_paper_is_found_by_its_pmid(searcher: Searcher) -> None:
    assert searcher.find(PAPERS[5].pmid) == PAPERS[5]
    assert searcher.find("99999999") is None


@needs_minilm
def test_an_index_whose_parts_do_not_fit_is_refused(built: Settings, tmp_path: Path) -> None:
    shutil.copytree(built.storage.data_dir, tmp_path / "data", symlinks=True)
    folder = (tmp_path / "data" / "index").resolve()
    shutil.rmtree(folder / "filters")
    write_filters(PAPERS, folder)
    with pytest.raises(ArtifactError, match=rf"filters of {len(PAPERS)}; make it again"):
        Searcher(settings_for(tmp_path / "data", RETRIEVAL__ENCODER__MAX_TOKENS="256"))


# ---- the cross-encoder -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory, built: Settings) -> Path:
    """A tiny one with random weights: it says nothing true, but always the same."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from shared.model_files import resolve_model

    folder = tmp_path_factory.mktemp("cross-encoder")
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(**sizes, num_labels=1, initializer_range=1.0)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model(built.retrieval.encoder.model, built)).save_pretrained(folder)
    return folder


def with_model(built: Settings, **more: object) -> Settings:
    return built.model_copy(update={"retrieval": built.retrieval.model_copy(update=more)})


@needs_minilm
def test_reranked_hits_are_the_candidates_in_the_models_order(built: Settings, cross_encoder: Path) -> None:
    searcher = Searcher(with_model(built, rerank_model=str(cross_encoder), rerank_candidates=12))
    texts = ["metformin in sepsis", "lithium " * 300]
    plain = searcher.search_each([Query(text, 12, "hybrid") for text in texts])
    queries = [Query(text, 5, "hybrid", rerank=True) for text in texts]
    together = searcher.search_each([*queries, Query("gout", 2, "bm25")])
    for hits, candidates, query in zip(together, plain, queries, strict=False):
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert len(hits) == 5
        known = {hit.paper.pmid: (hit.dense, hit.bm25) for hit in candidates}
        assert all(known[hit.paper.pmid] == (hit.dense, hit.bm25) for hit in hits)
        assert order(searcher.search_each([query])[0]) == order(hits)
    assert len({hit.score for hit in together[0]}) > 1
    assert [hit.bm25 for hit in together[2]] == [hit.score for hit in together[2]]


def order(hits: Sequence[Hit]) -> list[tuple[str, Any]]:
    return [(hit.paper.pmid, pytest.approx(hit.score, abs=1e-4)) for hit in hits]


@needs_minilm
def test_reranking_without_a_model_is_refused_by_name(searcher: Searcher) -> None:
    with pytest.raises(NoReranker, match=r"retrieval\.rerank_model"):
        searcher.search_each([Query("gout", 3, "hybrid"), Query("gout", 3, "hybrid", rerank=True)])
    assert issubclass(NoReranker, ValueError)


@needs_minilm
def test_a_model_that_is_no_cross_encoder_is_refused(built: Settings, cross_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a cross-encoder with safetensors weights"):
        Searcher(with_model(built, rerank_model=str(tmp_path)))
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    for name, kind, labels in (("classes", BertForSequenceClassification, 3), ("encoder", BertModel, 1)):
        kind(BertConfig(**sizes, num_labels=labels)).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(cross_encoder).save_pretrained(tmp_path / name)
        with pytest.raises(ArtifactError, match=rf"with 1 output at '{tmp_path / name}'"):
            Searcher(with_model(built, rerank_model=str(tmp_path / name)))
