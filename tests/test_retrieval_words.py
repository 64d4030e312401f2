"""Words, filters, sentences: what counts as the same word, exact order, what a filter allows, damaged files."""

import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.retrieval import words as words_module
from services.retrieval.filters import FilterIndex, folded, write_filters, year_of
from services.retrieval.highlights import best_sentence, sentences
from services.retrieval.query import Filters
from services.retrieval.terms import LONGEST_TERM, terms
from services.retrieval.words import FOLDER, TITLE_WEIGHT, WordIndex, write_words
from shared.files import ArtifactError
from shared.records import Paper

NAMED = "sepsis gout asthma melanoma lithium aspirin warfarin insulin insulins β-carotene il-6 the of"
VOCABULARY = NAMED.split()
TEXTS = st.lists(st.sampled_from(VOCABULARY), max_size=8).map(" ".join)


def papers_of(texts: list[str]) -> list[Paper]:
    """Papers with the first word of a text as the title and the rest as the abstract."""
    parts = [text.partition(" ") for text in texts]
    return [Paper(str(row), title, abstract) for row, (title, _, abstract) in enumerate(parts)]


def index_of(folder: Path, papers: list[Paper]) -> WordIndex:
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    write_words(papers, folder)
    return WordIndex.read(folder / FOLDER)


def fieldnorm(length: int) -> int:
    """The length that tantivy keeps: exact up to 40, then of eight steps for each doubling, rounded down."""
    if length < 40:
        return length
    bits = (length - 24).bit_length()
    step = 1 << (bits - 4)
    return 24 + (length - 24) // step * step


def bm25(papers: list[Paper], query: str) -> list[float]:
    """The formula, from the papers' terms."""
    bags = [Counter(terms(paper.title) * TITLE_WEIGHT + terms(paper.abstract)) for paper in papers]
    mean = sum(bag.total() for bag in bags) / len(bags) or 1.0
    scores = []
    for bag in bags:
        score = 0.0
        for term in set(terms(query)):
            holding = sum(term in other for other in bags)
            idf = math.log1p((len(bags) - holding + 0.5) / (holding + 0.5))
            norm = 1.2 * (0.25 + 0.75 * fieldnorm(bag.total()) / mean)
            score += idf * bag[term] * 2.2 / (bag[term] + norm)
        scores.append(score)
    return scores


# ---- terms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "same",
    [
        ("IL-6", "IL6"),
        ("IL-6", "IL 6"),
        ("IL6", "IL 6"),
        ("TNF-α", "TNF-alpha", "TNFα"),
        ("β-catenin", "beta catenin", "Beta-Catenin"),
        ("SARS-CoV-2", "SARS CoV 2", "SARS-CoV2"),
        ("H₂O₂", "H2O2"),
        ("CD4+", "CD4", "cd4"),
        ("5 mg", "5mg"),
        ("Sjögren’s", "Sjogren's"),
        ("miR‑21", "miR-21", "miR–21", "miR21"),
        ("insulins", "insulin"),
        ("0·05", "0.05"),
    ],
)
def test_ways_to_write_one_name_share_a_word(same: tuple[str, ...]) -> None:
    assert all(set(terms(one)) & set(terms(other)) for one in same for other in same)


@pytest.mark.parametrize(("one", "other"), [("IL-6", "IL-8"), ("no effect", "effect"), ("p53", "p21 "), ("CD4", "CD8")])
def test_what_differs_is_told_apart(one: str, other: str) -> None:
    assert set(terms(one)) != set(terms(other))


def test_negations_are_words_and_stop_words_are_none() -> None:
    assert terms("The effect of this is not in it") == ["effect", "not"]
    assert terms("") == terms("of the and") == terms("?!… —") == []


@given(st.text())
def test_any_text_has_terms_that_are_plain_and_not_long(text: str) -> None:
    for term in terms(text):
        assert term
        assert len(term) <= LONGEST_TERM
        assert not any(sign.isspace() for sign in term)


def test_a_long_text_without_blanks_takes_no_time() -> None:
    assert terms("a" * 100_000) == ["a" * LONGEST_TERM]
    assert len(terms("a-" * 50_000)) <= 50_000


# ---- the word index --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=12), TEXTS)
def test_scores_are_bm25_and_order_is_by_score_then_row(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], query: str
) -> None:
    papers = papers_of(texts)
    index = index_of(tmp_path_factory.mktemp("words"), papers)
    expected = bm25(papers, query)
    found = index.search(query, len(papers))
    assert len(index) == len(papers)
    assert {row for _, row in found} == {row for row, score in enumerate(expected) if score > 0}
    assert [score for score, _ in found] == pytest.approx([expected[row] for _, row in found], rel=1e-5)
    assert found == sorted(found, key=lambda hit: (-hit[0], hit[1]))
    assert index.scores(query, range(len(papers))) == pytest.approx(dict(enumerate(expected)), rel=1e-5)


def test_equal_papers_are_in_order_of_rows_at_every_cut_and_in_every_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["gout and lithium", "sepsis", "lithium for gout in asthma", "gout " * 5]
    papers = papers_of([texts[row % 4] for row in range(400)])
    index = index_of(tmp_path, papers)
    everything = index.search("gout lithium insulin", 400)
    assert len(everything) == 300
    for top_k in (1, 2, 7, 15, 16, 99, 100, 101, 250, 300, 1000):
        assert index.search("gout lithium insulin", top_k) == everything[:top_k]
    rows = [row for _, row in everything]
    scores = {score for score, _ in everything}
    assert len(scores) == 3
    assert rows == [row for score in sorted(scores, reverse=True) for row in rows_with(score, everything)]


def rows_with(score: float, hits: list[tuple[float, int]]) -> list[int]:
    return sorted(row for other, row in hits if other == score)


@pytest.mark.parametrize("few", [0, 10, 1000])
def test_a_mask_gives_the_best_of_the_allowed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(words_module, "FEW_ROWS", few)
    draw = np.random.default_rng(4)
    papers = papers_of([" ".join(draw.choice(VOCABULARY, 6)) for _ in range(300)])
    index = index_of(tmp_path, papers)
    everything = index.search("gout lithium il6", 300)
    for share in (0.0, 0.02, 0.3, 1.0):
        allowed = draw.random(300) < share
        expected = [hit for hit in everything if allowed[hit[1]]]
        for top_k in (1, 5, 40, 300):
            assert index.search("gout lithium il6", top_k, allowed) == expected[:top_k]


def test_signs_have_no_meaning_and_repetition_no_weight(tmp_path: Path) -> None:
    index = index_of(tmp_path, papers_of(["gout in men", "sepsis in women", "lithium"]))
    plain = index.search("gout sepsis", 3)
    assert {row for _, row in plain} == {0, 1}
    for text in ("+gout -sepsis", '"gout" AND (sepsis', "gout^9 sepsis*", "gout gout gout sepsis", "gout:sepsis [TO]~"):
        assert {hit for hit in index.search(text, 3) if hit[1] != 2} >= {hit for hit in plain if hit[1] == 0}
    assert index.search("row:1 zzz", 3) == []
    assert index.search("", 3) == index.search("the", 3) == index.search("gout", 0) == []
    assert index.scores("", [0, 2]) == {0: 0.0, 2: 0.0}


def test_a_query_of_any_length_is_answered(tmp_path: Path) -> None:
    index = index_of(tmp_path, papers_of(["gout", "sepsis"]))
    assert [row for _, row in index.search("x" * 100_000 + " sepsis " + " ".join(map(str, range(5000))), 2)] == [1]


def test_papers_without_words_and_no_papers_at_all_are_no_trouble(tmp_path: Path) -> None:
    index = index_of(tmp_path, [Paper("1", "", ""), Paper("2", "the", "?")])
    assert (len(index), index.search("gout", 5)) == (2, [])
    empty = index_of(tmp_path, [])
    assert (len(empty), empty.search("gout", 5)) == (0, [])


def test_reading_leaves_a_folder_as_it_is_and_any_user_may_read(tmp_path: Path) -> None:
    index_of(tmp_path, papers_of(["gout"]))
    before = {path.name: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()}
    assert [row for _, row in WordIndex.read(tmp_path / FOLDER).search("gout", 1)] == [0]
    assert {path.name: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()} == before
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / FOLDER).iterdir())


def test_a_damaged_folder_is_refused_with_its_name_and_the_remedy(tmp_path: Path) -> None:
    index_of(tmp_path, papers_of(["gout", "sepsis"]))
    for path in sorted((tmp_path / FOLDER).iterdir()):
        broken = tmp_path / f"broken-{path.name}"
        shutil.copytree(tmp_path / FOLDER, broken)
        (broken / path.name).write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ArtifactError, match=rf"{broken} is no word index .*services.retrieval.build"):
            WordIndex.read(broken)
    with pytest.raises(ArtifactError, match="is no word index"):
        WordIndex.read(tmp_path / "nowhere")


# ---- filters ---------------------------------------------------------------------------------------------------------


def described(row: int, **more: object) -> Paper:
    return Paper(str(row), "", "", **more)  # type: ignore[arg-type]


INVESTIGATION = {"journal": "The Journal of Clinical Investigation", "journal_abbreviation": "J Clin Invest"}
DESCRIBED = [
    described(0, pub_date="1999-03", **INVESTIGATION),
    described(1, pub_date="2005", mesh_terms=("Gout", "Humans"), publication_types=("Review", "Journal Article")),
    described(2, pub_date="2010-01", journal="Nature", mesh_terms=("Sepsis", "Humans"), publication_types=("Letter",)),
    described(3, pub_date="", journal="Nature", mesh_terms=("gout",)),
    described(4),
]


@pytest.mark.parametrize(
    ("filters", "rows"),
    [
        (Filters(year_from=2005), [1, 2]),
        (Filters(year_to=2005), [0, 1]),
        (Filters(year_from=2000, year_to=2009), [1]),
        (Filters(year_from=2011), []),
        (Filters(year_from=-5, year_to=99_999), [0, 1, 2]),
        (Filters(journals=("j. clin. invest.",)), [0]),
        (Filters(journals=("THE JOURNAL OF CLINICAL  INVESTIGATION", "nature")), [0, 2, 3]),
        (Filters(mesh_terms=("GOUT",)), [1, 3]),
        (Filters(mesh_terms=("humans",), publication_types=("review",)), [1]),
        (Filters(publication_types=("Review", "Letter")), [1, 2]),
        (Filters(mesh_terms=("Humans", "no such term")), [1, 2]),
        (Filters(mesh_terms=("no such term",)), []),
        (Filters(journals=("",)), []),
    ],
)
def test_a_filter_allows_what_fulfils_all_its_conditions(tmp_path: Path, filters: Filters, rows: list[int]) -> None:
    write_filters(DESCRIBED, tmp_path)
    index = FilterIndex.read(tmp_path / "filters")
    allowed = index.allowed(filters)
    assert allowed is not None
    assert np.flatnonzero(allowed).tolist() == rows
    assert index.allowed(filters) is allowed


NAMES = st.lists(st.sampled_from(["Gout", "Humans", "β-Carotene", "Mice", "U.S."]), max_size=4).map(tuple)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["", "1990", "2001-05"]), NAMES, NAMES), max_size=20), NAMES, NAMES)
def test_masks_are_what_reading_every_paper_gives(
    tmp_path_factory: pytest.TempPathFactory,
    made: list[tuple[str, tuple[str, ...], tuple[str, ...]]],
    terms_wanted: tuple[str, ...],
    types_wanted: tuple[str, ...],
) -> None:
    papers = [
        described(row, pub_date=date, mesh_terms=mesh, publication_types=types)
        for row, (date, mesh, types) in enumerate(made)
    ]
    folder = tmp_path_factory.mktemp("filters")
    write_filters(papers, folder)
    index = FilterIndex.read(folder / "filters")
    wanted = Filters(year_from=1995, mesh_terms=terms_wanted, publication_types=types_wanted)
    expected = [
        year_of(paper) >= 1995
        and (not terms_wanted or bool({*map(folded, terms_wanted)} & {*map(folded, paper.mesh_terms)}))
        and (not types_wanted or bool({*map(folded, types_wanted)} & {*map(folded, paper.publication_types)}))
        for paper in papers
    ]
    allowed = index.allowed(wanted)
    assert allowed is not None
    assert allowed.tolist() == expected
    assert len(index) == len(papers)


def test_no_condition_is_no_mask_and_few_masks_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.retrieval.filters.MASK_BYTES", 3 * len(DESCRIBED))
    write_filters(DESCRIBED, tmp_path)
    index = FilterIndex.read(tmp_path / "filters")
    assert index.allowed(Filters()) is None
    first = index.allowed(Filters(year_from=1990))
    for year in range(1991, 1994):
        index.allowed(Filters(year_from=year))
    again = index.allowed(Filters(year_from=1990))
    assert again is not first
    assert first is not None
    assert again is not None
    assert again.tolist() == first.tolist()


def test_damaged_columns_are_refused_with_the_folder(tmp_path: Path) -> None:
    write_filters(DESCRIBED, tmp_path)
    for path in sorted((tmp_path / "filters").iterdir()):
        broken = tmp_path / f"broken-{path.name}"
        shutil.copytree(tmp_path / "filters", broken)
        (broken / path.name).write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ArtifactError, match=rf"{broken} holds no columns .*services.retrieval.build"):
            FilterIndex.read(broken)


# ---- sentences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "We used drugs, e.g. aspirin, vs. placebo.|The risk fell by 0.5 (P < 0.05).|J. Doe et al. found none.",
        "Mice (C57BL/6) got 10 mg/kg i.p. for 3 days.|E. coli and S. aureus grew at 37 °C.|Growth fell by approx. 40%.",
        "BACKGROUND: Little is known.|METHODS: We measured IL-6 (Fig. 2) in 30 patients.|RESULTS: It rose.",
        "Is it safe?|We do not know!|See ref. 12 for more.",
        "The U.S. Population is large.|Dr. Smith et al. disagree, cf. Table 1.",
        "Levels were 3.5 vs. 4.1 ng/ml (n = 12).|p53 was mutated.|α-Synuclein aggregates.",
        "It grew.[12]|Then it stopped.(3)|In S. cerevisiae var. boulardii it does not.",
        "Values were 2.1 +/- 0.3 mmol/l.|However, i.e. in controls, no. 5 was absent.|The answer is no.|We stop.",
        "Few took vitamin A.|Patients with hepatitis B did not; all got 5 mg b.i.d. 3 times.",
        'He said "stop."|Then they went on (as planned).|They ended.;|To learn more, we asked.',
    ],
)
def test_sentences_end_where_they_end(text: str) -> None:
    assert sentences(text.replace("|", " ")) == text.split("|")


@given(st.text(alphabet=st.sampled_from("aAb1α .?!;)(]['\"\n\ud800"), max_size=60))
def test_splitting_loses_nothing_but_blanks(text: str) -> None:
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


def test_the_best_sentence_holds_the_rarest_words() -> None:
    abstract = "Patients had sepsis. Patients took lithium for gout. Patients, patients and sepsis."
    weights = {"patient": 0.1, "lithium": 2.0, "gout": 1.5, "sepsi": 1.0}
    assert best_sentence(abstract, weights) == "Patients took lithium for gout."
    assert best_sentence(abstract, {"patient": 0.1}) == "Patients had sepsis."
    assert best_sentence(abstract, {"melanoma": 3.0}) == best_sentence("", weights) == best_sentence(abstract, {}) == ""
