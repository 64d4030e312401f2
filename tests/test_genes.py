"""Gene symbols: names that mean one gene, words that claim to be one, and acronyms that never do."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.genes import (
    FAMILIES,
    SEVERAL_PRODUCTS,
    STOP,
    TABLE,
    USUAL,
    canonical_symbol,
    compact,
    gene_claims,
    genes,
)


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("C3", "C3"),
        ("TP53", "TP53"),
        ("tp53", "TP53"),
        ("p53", "TP53"),
        ("P53", "TP53"),
        ("HER2", "ERBB2"),
        ("HER-2", "ERBB2"),
        ("Il-6", "IL6"),
        ("IL 6", "IL6"),
        ("IL-8", "CXCL8"),
        ("IL-1β", "IL1B"),
        ("TGF-β1", "TGFB1"),
        ("TGF-beta1", "TGFB1"),
        ("TNF-α", "TNF"),
        ("TNF alpha", "TNF"),
        ("IFN-γ", "IFNG"),
        ("IFNgamma", "IFNG"),
        ("HIF-1α", "HIF1A"),
        ("β-catenin", "CTNNB1"),
        ("c-Myc", "MYC"),
        ("PD-L1", "CD274"),
        ("miR-21", "MIR21"),
        ("HLA-DRB1", "HLA-DRB1"),
        ("MET", "MET"),
    ],
)
def test_a_name_means_its_gene_in_any_case_with_any_hyphen_and_greek_letter(name: str, symbol: str) -> None:
    assert canonical_symbol(name) == symbol


@pytest.mark.parametrize("name", ["p21", "PD-1", "COX-2", "NRF2", "PSA"])
def test_an_alias_of_several_genes_means_the_one_that_papers_mean(name: str) -> None:
    assert canonical_symbol(name) == USUAL[name.lower().replace("-", "")]


@pytest.mark.parametrize("name", ["p40", "CAP", "TRAP", "RIP"])
def test_an_alias_of_several_genes_without_a_usual_one_means_none_and_is_still_known(name: str) -> None:
    assert canonical_symbol(name) is None
    assert gene_claims(f"the protein {name}") == {name: True}


@pytest.mark.parametrize("name", ["GLP-1", "GLP-2", "p14ARF", "p16", "ACTH", "MAPK2", "NF-κB", "AMPK", "IL-1"])
def test_products_numbered_siblings_and_families_stand_for_no_single_gene(name: str) -> None:
    assert canonical_symbol(name) is None


@pytest.mark.parametrize(
    "name", ["", " ", "was", "set", "rest", "fetal", "metabolism", "T4", "T", "alpha", "β", "a", "XYZQ9", "12"]
)
def test_english_words_and_unknown_names_mean_no_gene(name: str) -> None:
    assert canonical_symbol(name) is None


def test_each_symbol_of_the_table_means_itself_unless_it_is_an_everyday_acronym() -> None:
    stopped = {symbol for symbol in genes().symbols if canonical_symbol(symbol) is None}
    assert all(canonical_symbol(symbol) == symbol for symbol in genes().symbols - stopped)
    assert {symbol.lower() for symbol in stopped} <= STOP
    assert len(stopped) < 40


def test_the_hand_made_lists_agree_with_the_table_and_each_other() -> None:
    own = {symbol.lower().replace("-", "") for symbol in genes().symbols}
    assert set(USUAL.values()) | SEVERAL_PRODUCTS <= genes().symbols
    assert not FAMILIES & own
    assert not STOP & (FAMILIES | set(USUAL))
    assert len(STOP) > 120


def test_symbols_in_running_text_are_seen_and_looked_up() -> None:
    text = "In TP53-mutant cells, Il-6 and IL-6/STAT3, anti-TNF-α, p53, TGF-β1, EGFR, GM-CSF, HLA-B27 and ABCX1 count."
    known = ["TP53", "Il-6", "IL-6", "STAT3", "TNF-α", "p53", "TGF-β1", "EGFR", "GM-CSF", "HLA-B27"]
    assert gene_claims(text) == {**dict.fromkeys(known, True), "ABCX1": False}


@pytest.mark.parametrize(
    "text",
    [
        "PCR, qPCR, RT-PCR, MRI, CT, RNA, DNA, mRNA and ELISA in NSCLC, COPD and HIV (PMID 12345, PMID: 678)",
        "CI, OR, HR, RR, SD, SE, ANOVA, ROC, AUC, BMI, FDA, WHO, USA, UK and ICU",
        "SARS-CoV-2, COVID-19, HIV-1, H1N1, HPV16, HEK293, MCF-7, HbA1c, H3K27me3 and vitamin B12",
        "V600E, Glu342Lys and CAG repeats; Type-2, Day7 and Interleukin-6",
        "WHICH GENE IS LOST IN THIS CANCER?",
        "Plain words only.",
        "",
    ],
)
def test_acronyms_variants_viruses_and_capitals_are_no_gene_claims(text: str) -> None:
    assert gene_claims(text) == {}


def test_no_stopped_acronym_is_ever_a_gene() -> None:
    assert {name for name in STOP if canonical_symbol(name.upper())} == set()
    assert {name for name in STOP if gene_claims(f"the {name.upper()} of it")} == set()


def test_the_check_refuses_made_up_symbols() -> None:
    made_up = ["ZZQX9", "QQXW7", "ABCX1", "IL-99", "TP5300", "XQZJ"]
    assert gene_claims(f"the genes {', '.join(made_up)}") == dict.fromkeys(made_up, False)


@given(st.text())
def test_no_text_raises(text: str) -> None:
    assert all(word in text for word in gene_claims(text))
    assert canonical_symbol(text) in genes().symbols | {None}


def test_the_shipped_table_is_sorted_small_and_one_gene_a_line() -> None:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    assert lines == sorted(set(lines))
    assert all(line.count("\t") == 1 and line[0] != "\t" for line in lines)
    assert TABLE.stat().st_size < 900_000


def complete_set() -> Iterator[dict[str, str]]:
    row = {"status": "Approved", "locus_type": "gene with protein product", "prev_symbol": ""}
    yield {**row, "symbol": "TP53", "alias_symbol": "p53|LFS1"}
    yield {**row, "symbol": "ERBB2", "alias_symbol": "NEU|HER2", "prev_symbol": "NGL|NEU"}
    yield {**row, "symbol": "OLD1", "alias_symbol": "", "status": "Symbol Withdrawn"}
    yield {**row, "symbol": "TP53P1", "alias_symbol": "", "locus_type": "pseudogene"}
    yield {**row, "symbol": "LINC00001X", "alias_symbol": "", "locus_type": "RNA, long non-coding"}


def test_the_table_is_made_from_the_complete_set() -> None:
    assert compact(complete_set()) == ["ERBB2\tNEU|HER2|NGL", "TP53\tp53|LFS1"]


def test_the_table_is_made_from_a_custom_download() -> None:
    row = {
        "Approved symbol": "ERBB2",
        "Alias symbols": "NEU, HER2",
        "Previous symbols": "NGL",
        "Locus type": "gene with protein product",
        "Status": "Approved",
    }
    assert compact(iter([row])) == ["ERBB2\tNEU|HER2|NGL"]


def test_a_table_without_the_needed_columns_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="expected a column symbol or Approved symbol, found gene"):
        compact(iter([{"gene": "TP53"}]))
