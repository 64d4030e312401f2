"""The reward's formulas: tables of the paper, and what must hold for any proposal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.scores import Proposal, answer_part, difficulty, format_parts, format_score, reward, tool_part

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


def test_a_good_one_hop_proposal_has_every_part_in_full() -> None:
    parts = format_parts(proposal(GOOD))
    assert parts == {"integrity": 1, "think": 1, "tool": 1, "question": 1, "answer": 1}
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
    assert answer_part("no", "nothing known") == 0.25


@pytest.mark.parametrize(
    ("hop", "searches", "failed", "expected"),
    [
        (1, 0, 0, 1),
        (1, 1, 0, 1),
        (1, 0, 1, 0),
        (2, 0, 0, 0),
        (2, 1, 0, 1),
        (2, 5, 0, 1),
        (3, 1, 0, 0.5),
        (4, 1, 9, 1 / 3),
    ],
)
def test_tool_part_counts_searches_that_brought_papers(hop: int, searches: int, failed: int, expected: float) -> None:
    assert tool_part(hop, searches, failed) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("", 0), ("AMPK", 1), ("one two three four five", 1), ("one two three four five six", 0.5), ("unseen", 0.25)],
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
