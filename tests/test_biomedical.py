"""The biomedical reward parts: formulas, degenerate cases, and what must never earn credit."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.biomedical import (
    REASONING_TYPES,
    REASONING_WORTH,
    citation_part,
    gene_part,
    novelty_part,
    reasoning_part,
    reasoning_type,
)

QUESTION = "By which mechanism does metformin lower hepatic glucose production?"
shares = st.floats(0, 0.99)


@pytest.mark.parametrize(
    ("cited", "seen", "corpus", "expected"),
    [
        ((), {"1"}, {"1"}, 0.0),
        (("1",), {"1", "2"}, {"1", "2"}, 1.0),
        (("1", "2"), {"1"}, {"1", "2"}, 0.5),
        (("1", "2"), {"1", "2"}, {"1"}, 0.5),
        (("1",), set[str](), {"1"}, 0.0),
        (("1", "1", "3"), {"1"}, {"1"}, 0.5),
    ],
)
def test_a_citation_counts_when_it_was_seen_and_is_in_the_corpus(
    cited: tuple[str, ...], seen: set[str], corpus: set[str], expected: float
) -> None:
    assert citation_part(cited, seen, corpus.__contains__) == expected


def test_the_corpus_is_asked_only_about_citations_that_were_seen() -> None:
    asked: list[str] = []

    def known(pmid: str) -> bool:
        asked.append(pmid)
        return True

    assert citation_part(("1", "2"), {"2"}, known) == 0.5
    assert asked == ["2"]


def test_no_part_loads_anything_that_could_reach_a_network() -> None:
    wanted = "{'socket', 'httpx', 'urllib.request'}"
    script = f"import sys, services.trainer.biomedical; sys.exit(bool({wanted} & {{*sys.modules}}))"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 1.0),
        ("Which enzyme does aspirin inhibit?", 1.0),
        ("PCR and MRI in NSCLC (PMID 123)", 1.0),
        ("Does p53 raise IL-6?", 1.0),
        ("Does ZZQX9 raise Il-6?", 0.5),
        ("Does ZZQX9 bind QQXW7?", 0.0),
    ],
)
def test_the_gene_part_is_the_share_of_claimed_symbols_that_exist(text: str, expected: float) -> None:
    assert gene_part(text) == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (QUESTION, "mechanism"),
        ("How does imatinib stop BCR-ABL1?", "mechanism"),
        ("Which pathway is activated by insulin?", "mechanism"),
        ("Why do carriers of HLA-B*57:01 react to abacavir?", "cause"),
        ("Mutations of which gene cause cystic fibrosis?", "cause"),
        ("Is apixaban safer than warfarin?", "comparison"),
        ("Rituximab versus placebo: who relapsed?", "comparison"),
        ("Which drug is given for hereditary tyrosinaemia?", "intervention"),
        ("Which variant is associated with early onset?", "association"),
        ("How many patients were treated with the drug?", "quantity"),
        ("What proportion of carriers stayed healthy?", "quantity"),
        ("Which kinase is this?", "entity"),
        ("Name the enzyme.", "entity"),
        ("Tell me.", "other"),
        ("", "other"),
        ("Whyever drugstore pathwayless?", "other"),
    ],
)
def test_the_reasoning_type_is_read_from_whole_words(question: str, expected: str) -> None:
    assert reasoning_type(question) == expected
    assert reasoning_part(question) == REASONING_WORTH[expected]


def test_every_reasoning_type_has_a_worth() -> None:
    assert tuple(REASONING_WORTH) == REASONING_TYPES


def test_a_definition_earns_less_than_a_mechanism() -> None:
    assert reasoning_part("What is metformin?") < reasoning_part(QUESTION)


def test_a_first_question_is_new_and_an_empty_one_never() -> None:
    assert novelty_part(QUESTION, [], 0.8) == 1.0
    assert novelty_part("", [], 0.8) == 0.0
    assert novelty_part("?!", [QUESTION], 0.8) == 0.0


@pytest.mark.parametrize(
    "copy",
    [
        QUESTION,
        QUESTION.upper(),
        "Metformin: by which mechanism does hepatic glucose production lower?",
        f"{QUESTION} (PMID 123)",
    ],
)
def test_a_copy_earns_nothing_in_any_case_word_order_or_citation(copy: str) -> None:
    assert novelty_part(copy, ["Which gene is mutated?", QUESTION], 0.8) == 0.0


def test_a_longer_question_is_no_copy_of_the_one_it_contains() -> None:
    longer = f"{QUESTION[:-1]} in carriers of the loss-of-function variant of the transporter OCT1?"
    assert novelty_part(longer, [QUESTION], 0.8) == 1.0


def test_novelty_falls_linearly_from_the_threshold() -> None:
    near = novelty_part("abcd efgh", ["abcd efgx"], 0.5)
    assert near == pytest.approx((1 - 8 / 9) / 0.5)
    assert novelty_part("abcd efgh", ["abcd efgx"], 0.9) == 1.0


def test_two_wrong_answers_do_not_look_alike_because_both_are_cited() -> None:
    assert novelty_part("KRAS (PMID 1)", ["EGFR (PMID 2)"], 0.8) == 1.0


@given(st.text(), st.lists(st.text(), max_size=4), shares)
def test_every_part_of_any_text_is_a_share(text: str, recent: list[str], threshold: float) -> None:
    for part in (gene_part(text), reasoning_part(text), novelty_part(text, recent, threshold)):
        assert 0 <= part <= 1


@given(st.lists(st.text(), max_size=5), st.sets(st.text()))
def test_the_citation_part_of_any_lists_is_a_share(cited: list[str], seen: set[str]) -> None:
    assert 0 <= citation_part(cited, seen, seen.__contains__) <= 1
