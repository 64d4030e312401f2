"""Answer matching: the field's exact match, citations taken off, and the listed synonyms and nothing else."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.matching import (
    cited_pmids,
    contains,
    exact_match,
    match_credit,
    normalise,
    strip_citations,
    synonymous,
)

PIECES = [
    "PMID",
    "PMIDs",
    " ",
    ":",
    "(",
    ")",
    "[",
    "]",
    ",",
    " and ",
    "123",
    "45678",
    "BRCA1",
    "α",
    "5 mg",
    "%",
    "one",
    ".",
]
texts = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))

SAME = [
    # genes and proteins
    ("HER2", "ERBB2"),
    ("HER-2/neu", "HER2/neu"),
    ("p53", "TP53"),
    ("HER2 amplification", "ERBB2 amplification"),
    ("HER2-positive", "ERBB2 positive"),
    ("mutated p53", "mutated TP53"),
    ("PD-L1", "CD274"),
    ("TNF-α", "TNF alpha"),
    ("IL-8", "CXCL8"),
    ("COX-2", "PTGS2"),
    # Greek letters
    ("α-synuclein", "alpha-synuclein"),
    ("TGF-β signalling", "TGF-beta signaling"),
    ("interferon γ", "interferon-gamma"),
    ("NF-κB", "NF-kB"),
    # numbers
    ("two", "2"),
    ("Twenty-five patients", "25 patients"),
    ("twofold", "2-fold"),
    ("1,000", "1000"),
    ("1,234,567 cells", "1234567 cells"),
    ("0.50", "0.5"),
    (".5", "0.5"),
    ("12.0", "12"),
    ("50%", "50 percent"),
    ("50 %", "50 per cent"),
    ("fifty percent", "50%"),
    # units
    ("5 µg", "5 mcg"),
    ("5 μg", "5 micrograms"),
    ("5mg", "5 mg"),
    ("5 mg", "5 milligrams"),
    ("10 mL", "10 millilitres"),
    ("10 ml", "10 milliliter"),
    ("24 h", "24 hours"),
    ("24-hour", "24 hrs"),
    ("30 min", "30 minutes"),
    ("7 d", "seven days"),
    ("2 mg/kg", "2 mg per kg"),
    ("7.0 mmol/L", "7 millimoles per litre"),
    ("140 mm Hg", "140 mmHg"),
    ("2 mg/kg/day", "2 mg per kg per day"),
    # hyphens, spaces, slashes
    ("IL-6", "IL 6"),
    ("IL-6", "IL6"),
    ("beta-catenin", "beta catenin"),
    ("β-catenin", "beta catenin"),
    ("PI3K/AKT pathway", "PI3K-AKT pathway"),
    ("non–small-cell lung cancer", "non-small cell lung cancer"),
    # plurals and possessives
    ("receptors", "receptor"),
    ("biopsies", "biopsy"),
    ("kinases", "kinase"),
    ("viruses", "virus"),
    ("metastases", "metastasis"),
    ("bacteria", "bacterium"),
    ("Crohn's disease", "Crohn disease"),
    ("Crohn’s disease", "Crohn's disease"),
    # British and American spelling
    ("tumour", "tumor"),
    ("oesophageal cancer", "esophageal cancer"),
    ("haemoglobin", "hemoglobin"),
    ("leukaemia", "leukemia"),
    ("cerebral oedema", "cerebral edema"),
    ("paediatric", "pediatric"),
    ("oestrogen receptor", "estrogen receptor"),
    ("diarrhoea", "diarrhea"),
    ("anaesthesia", "anesthesia"),
    ("hospitalisation", "hospitalization"),
    ("muscle fibres", "muscle fiber"),
    ("sulphonylureas", "sulfonylurea"),
]

DIFFERENT = [
    ("IL-6", "IL-8"),
    ("TP53", "TP63"),
    ("ESR1", "ESR2"),
    ("BRCA1", "BRCA2"),
    ("HER2", "HER3"),
    ("ERK1", "ERK2"),
    ("MAPK1", "MAPK2"),
    ("GLP-1", "GLP-2"),
    ("p14ARF", "p16INK4a"),
    ("ACTH", "MSH"),
    ("IL-1α", "IL-1β"),
    ("IL-1", "IL-1β"),
    ("TGF-α", "TGF-β"),
    ("CD4", "CD8"),
    ("CD4", "T4"),
    ("TBXT cells", "T cells"),
    ("miR-21", "miR-221"),
    ("alpha", "beta"),
    ("alpha", "a"),
    ("α", "a"),
    ("5 mg", "5 µg"),
    ("5 mg", "5 mL"),
    ("5 mg", "6 mg"),
    ("5 h", "5 days"),
    ("5 min", "5 months"),
    ("2 mg/kg", "2 mg"),
    ("5 mmol/L", "5 mg/L"),
    ("two", "three"),
    ("50%", "5%"),
    ("1,000", "100"),
    ("2 4", "24"),
    ("increase", "decrease"),
    ("hypertension", "hypotension"),
    ("hyperglycaemia", "hypoglycaemia"),
    ("agonist", "antagonist"),
    ("inhibits", "activates"),
    ("type 1 diabetes", "type 2 diabetes"),
    ("diabetes", "diabete"),
    ("apoptosis", "apoptosi"),
    ("virus", "viru"),
    ("atypical", "typical"),
    ("CT", "CHAT"),
    ("ALL", "BCR"),
    ("CML", "BCR"),
    ("fetal", "FHL"),
    ("was", "Wiskott-Aldrich syndrome"),
    ("metformin", "metformin and insulin"),
    ("", "TP53"),
]


@pytest.mark.parametrize(("left", "right"), SAME)
def test_listed_forms_are_synonymous(left: str, right: str) -> None:
    assert synonymous(left, right)
    assert synonymous(right, left)


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_what_is_not_listed_is_not_synonymous(left: str, right: str) -> None:
    assert not synonymous(left, right)
    assert not synonymous(right, left)
    assert match_credit(left, right, 1.0) == 0.0


@pytest.mark.parametrize(
    ("answer", "gold", "credit"),
    [
        ("Apoptosis.", "apoptosis", 1.0),
        ("HER2", "ERBB2", 0.7),
        ("ESR1", "ESR2", 0.0),
        ("ERBB2 (PMID 12345678)", "ERBB2", 1.0),
        ("HER2 (PMID 12345678)", "ERBB2", 0.7),
    ],
)
def test_an_exact_match_counts_in_full_and_a_synonym_what_it_is_worth(answer: str, gold: str, credit: float) -> None:
    assert match_credit(answer, gold, 0.7) == credit


@pytest.mark.parametrize(
    ("left", "right"), [("50%", "50"), ("1.5 mg", "15 mg"), ("CD4+", "CD4"), ("hepatitis A", "hepatitis")]
)
def test_what_only_the_fields_exact_match_takes_for_the_same_stays_the_reported_match(left: str, right: str) -> None:
    assert exact_match(left, right)
    assert match_credit(left, right, 0.5) == 1.0


@pytest.mark.parametrize("empty", ["", " ", ".", "the", "(PMID 123)", "PMID 123", "%"])
@pytest.mark.parametrize("gold", ["", "the", "PMID 123", "PMID 456", "%"])
def test_nothing_never_matches_nothing(empty: str, gold: str) -> None:
    assert not exact_match(empty, gold)
    assert not synonymous(empty, gold)
    assert match_credit(empty, gold, 1.0) == 0.0
    assert not contains("some text", empty)


def test_a_cited_answer_keeps_its_credit_and_may_be_cited_anywhere() -> None:
    for cited in ("AMPK (PMID 123)", "PMID 123: AMPK", "[PMID:123] AMPK.", "AMPK, PMIDs 123 and 456", "AMPK PMID123"):
        assert exact_match(cited, "AMPK")
        assert contains("Metformin activates AMPK.", cited)
        assert contains(f"It is {cited}", "AMPK")


def test_two_wrong_answers_do_not_look_alike_because_both_are_cited() -> None:
    assert match_credit("KRAS (PMID 1)", "EGFR (PMID 2)", 1.0) == 0.0
    assert match_credit("KRAS (PMID 1)", "EGFR (PMID 1)", 1.0) == 0.0


@pytest.mark.parametrize(
    ("text", "pmids"),
    [
        ("PMID 123", ("123",)),
        ("PMID: 123", ("123",)),
        ("pmid:123", ("123",)),
        ("PMID123", ("123",)),
        ("(PMID:123, PMID 456)", ("123", "456")),
        ("[PMID 123]", ("123",)),
        ("PMIDs 123 and 456", ("123", "456")),
        ("PMIDs: 1, 2, and 3", ("1", "2", "3")),
        ("PMID 12345678, 23456789", ("12345678", "23456789")),
        ("PubMed ID: 123", ("123",)),
        ("PMID 990000001", ("990000001",)),
        ("PMID 2 then PMID 1 then PMID 2", ("2", "1")),
        ("PMID 123, 45 patients", ("123",)),
        ("PMID 1234567890", ()),
        ("PMID", ()),
        ("123", ()),
        ("XPMID 123", ()),
        ("", ()),
    ],
)
def test_citations_are_read_in_order_and_once(text: str, pmids: tuple[str, ...]) -> None:
    assert cited_pmids(text) == pmids


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("AMPK (PMID 123)", "AMPK"),
        ("AMPK (PMID:123, PMID 456).", "AMPK."),
        ("AMPK [PMID 123] is active", "AMPK is active"),
        ("AMPK (see PMID 123; PMID 456)", "AMPK"),
        ("AMPK (Zhou 2001, PMID 123)", "AMPK (Zhou 2001)"),
        ("AMPK, PMID 123, PMID 456 and PMID 789", "AMPK"),
        ("PMIDs 123 and 456: AMPK", "AMPK"),
        ("PMID 123, 45 patients", "45 patients"),
        ("PMID 123", ""),
    ],
)
def test_a_stripped_citation_leaves_nothing_behind(text: str, bare: str) -> None:
    assert strip_citations(text) == bare


@given(st.text().filter(lambda text: "pm" not in text.lower() and "pub" not in text.lower()))
def test_without_citations_the_text_and_the_fields_exact_match_stand_as_they_are(text: str) -> None:
    assert strip_citations(text) == text
    assert exact_match(text, text) == (normalise(text) != "")


@given(texts, texts)
def test_synonymy_is_symmetric_and_includes_the_exact_match(left: str, right: str) -> None:
    assert synonymous(left, right) == synonymous(right, left)
    assert synonymous(left, right) or not exact_match(left, right)


@given(texts)
def test_every_text_that_says_something_is_its_own_synonym(text: str) -> None:
    assert synonymous(text, text) == exact_match(text, text) == (normalise(strip_citations(text)) != "")


@given(texts)
def test_a_stripped_text_cites_no_less_than_it_did_nor_says_what_it_did_not(text: str) -> None:
    assert len(strip_citations(text)) <= len(text)
    assert contains(text, text) == exact_match(text, text)
    assert len(set(cited_pmids(text))) == len(cited_pmids(text))


@given(texts)
def test_normalising_again_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(texts, texts, st.floats(0, 1))
def test_a_credit_is_a_share(answer: str, gold: str, worth: float) -> None:
    assert match_credit(answer, gold, worth) in (0.0, worth, 1.0)


@pytest.mark.parametrize(
    "piece", [" ", ",", "PMID ", "PMIDs 1,", "1,", "1,000", "a-", "(", "IL-", "5 mg/", "one ", "."]
)
def test_a_long_repeated_answer_is_judged_quickly(piece: str) -> None:
    text = piece * 5_000
    start = time.monotonic()
    synonymous(text, f"{text}x")
    assert time.monotonic() - start < 5


def test_citations_within_citations_leave_nothing() -> None:
    assert strip_citations("PMID PMID 1 2") == ""
