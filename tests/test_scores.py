"""The reward's formulas: tables of the paper, and what must hold for any proposal."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.scores import (
    Proposal,
    answer_part,
    bonus,
    difficulty,
    expected_difficulty,
    format_parts,
    format_score,
    reward,
    tool_part,
)

GOOD = (
    "<think>The paper says so.</think>\n<question>Which kinase does metformin activate?</question>\n"
    "<answer>AMPK</answer>"
)


def proposal(
    *turns: str, hop: int = 1, searches: int = 0, failed: int = 0, evidence: str = "activates AMPK"
) -> Proposal:
    return Proposal(turns, hop, searches, failed, evidence)


@pytest.mark.parametrize(
    ("correct", "attempts", "expected"),
    [
        (0, 5, 0),
        (1, 5, 1),
        (2, 5, 0.75),
        (3, 5, 0.5),
        (4, 5, 0.25),
        (5, 5, 0),
        (0, 3, 0),
        (1, 3, 1),
        (2, 3, 0.5),
        (3, 3, 0),
    ],
)
def test_difficulty_is_the_papers_table(correct: int, attempts: int, expected: float) -> None:
    assert difficulty(correct, attempts) == expected


@pytest.mark.parametrize(("correct", "attempts"), [(-1, 3), (4, 3), (1, 1)])
def test_difficulty_refuses_what_cannot_be(correct: int, attempts: int) -> None:
    with pytest.raises(ValueError, match="attempts"):
        difficulty(correct, attempts)


@pytest.mark.parametrize(("credit", "expected"), [(0.5, 1.0), (1.0, 1.0), (1.5, 0.75), (3.0, 0.0)])
def test_difficulty_with_partial_credit_stays_in_range(credit: float, expected: float) -> None:
    assert difficulty(credit, 3) == expected


@pytest.mark.parametrize(
    ("attempts", "peak", "height"), [(3, 0.42, 0.577), (4, 0.37, 0.630), (5, 0.33, 0.669), (8, 0.26, 0.743)]
)
def test_expected_difficulty_peaks_where_the_paper_says(attempts: int, peak: float, height: float) -> None:
    rates = [rate / 1000 for rate in range(1001)]
    best = max(rates, key=lambda rate: expected_difficulty(rate, attempts))
    assert best == pytest.approx(peak, abs=0.005)
    assert best == pytest.approx(1 - attempts ** (-1 / (attempts - 1)), abs=0.001)
    assert expected_difficulty(best, attempts) == pytest.approx(height, abs=0.001)


@pytest.mark.parametrize("attempts", [2, 3, 5, 8])
def test_expected_difficulty_is_the_mean_of_difficulty_over_the_binomial(attempts: int) -> None:
    for rate in (0.0, 0.1, 0.5, 0.9, 1.0):
        chances = [math.comb(attempts, k) * rate**k * (1 - rate) ** (attempts - k) for k in range(attempts + 1)]
        mean = sum(chance * difficulty(k, attempts) for k, chance in enumerate(chances))
        assert expected_difficulty(rate, attempts) == pytest.approx(mean)


def test_a_good_one_hop_proposal_has_every_part_in_full() -> None:
    parts = format_parts(proposal(GOOD))
    assert parts == {"integrity": 1, "think": 1, "tool": 1, "question": 1, "answer": 1, "answer_given": 1}
    assert format_score(parts, "graded") == format_score(parts, "gated") == 1


def test_the_gate_closes_when_the_answer_stands_in_the_question() -> None:
    leaked = GOOD.replace("Which kinase", "Which kinase, AMPK or mTOR,")
    parts = format_parts(proposal(leaked))
    assert parts["integrity"] == 0
    assert format_score(parts, "gated") == 0
    assert format_score(parts, "graded") == pytest.approx((1 + 1 + 0.5 + 1) / 4)


def test_an_answer_inside_a_longer_word_is_no_leak_and_no_evidence() -> None:
    text = "<think>x</think><question>Is this known?</question><answer>no</answer>"
    assert format_parts(proposal(text, evidence="nothing known"))["integrity"] == 1
    assert answer_part("no", "nothing known") == 0
    assert answer_part("in", "insulin") == 0


@pytest.mark.parametrize(
    ("hop", "searches", "failed", "expected"),
    [
        (1, 0, 0, 1),
        (1, 1, 0, 0.5),
        (1, 0, 1, 0.5),
        (2, 0, 0, 0),
        (2, 0, 3, 0),
        (2, 1, 0, 1),
        (2, 1, 4, 1),
        (2, 5, 0, 0.2),
        (3, 1, 0, 0.5),
        (3, 3, 0, 2 / 3),
        (4, 1, 9, 1 / 3),
        (4, 3, 0, 1),
    ],
)
def test_only_exactly_hop_minus_one_searches_that_brought_papers_earn_full_marks(
    hop: int, searches: int, failed: int, expected: float
) -> None:
    assert tool_part(hop, searches, failed) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("", 0), ("AMPK", 1), ("one two three four five", 1), ("one two three four five six", 0.5), ("unseen", 0)],
)
def test_answer_part_wants_evidence_and_brevity(answer: str, expected: float) -> None:
    assert answer_part(answer, "AMPK; one two three four five six") == expected


@given(
    st.lists(st.text(max_size=80), max_size=4),
    st.integers(1, 4),
    st.integers(0, 6),
    st.integers(0, 6),
    st.text(max_size=80),
)
def test_any_proposal_scores_within_range(
    turns: list[str], hop: int, searches: int, failed: int, evidence: str
) -> None:
    parts = format_parts(Proposal(tuple(turns), hop, searches, failed, evidence))
    assert all(0 <= value <= 1 for value in parts.values())
    for form in ("graded", "gated"):
        score = format_score(parts, form)
        assert 0 <= score <= 1
        assert 0 <= reward(score, 1.0, 0.5) <= 1.5
    assert parts["integrity"] > 0 or format_score(parts, "gated") == 0


@given(st.dictionaries(st.sampled_from(["citations", "genes"]), st.floats(0, 1)), st.floats(0, 0.5), st.booleans())
def test_no_bonus_passes_a_closed_gate(parts: dict[str, float], weight: float, gate: bool) -> None:
    earned = bonus(parts, dict.fromkeys(parts, weight), float(gate))
    assert 0 <= earned <= weight * len(parts) + 1e-9
    assert gate or earned == 0


def test_a_citation_costs_an_answer_nothing() -> None:
    cited = GOOD.replace("AMPK<", "AMPK (PMID 12345678)<")
    assert format_parts(proposal(cited)) == format_parts(proposal(GOOD))
    assert proposal(cited).answer == "AMPK"
    assert proposal(cited).cited_answer == "AMPK (PMID 12345678)"


def test_the_graded_form_pays_a_quarter_of_the_answer_part_for_any_answer() -> None:
    parts = format_parts(proposal(GOOD, evidence="nothing of the kind"))
    assert format_score(parts, "graded") == pytest.approx((1 + 1 + 1 + 0.25) / 4)
    assert format_score(parts, "gated") == pytest.approx((1 + 1 + 1 + 0) / 4)
