"""A verdict from a rollout and its attempts: what counts, what is invalid, what the variants add."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.judge import Surroundings, invalid_reason, judge, worth_attempting
from services.trainer.scores import Proposal
from shared.records import LOST, Attempt
from shared.settings import BiomedicalSettings, RewardSettings

QUESTION = "How does metformin lower hepatic glucose?"
TURN = f"<think>x</think><question>{QUESTION}</question><answer>AMPK activation (PMID 7)</answer>"
PROPOSAL = Proposal((TURN,), 1, 0, 0, "It works by AMPK activation.", ("7",))
AROUND = Surroundings("gated", (), lambda pmid: pmid == "7")
ENDINGS = ["answered", "no_answer", "length", *sorted(LOST)]


def attempt(answer: str, ended: str = "answered") -> Attempt:
    return Attempt(answer, ended, 0, 1, 0.1)


def attempts(*answers: str) -> list[Attempt]:
    return [attempt(answer) for answer in answers]


def settings(**values: object) -> RewardSettings:
    return RewardSettings.model_validate({"attempts": 3, **values})


def test_format_and_difficulty_make_the_paper_s_reward() -> None:
    verdict = judge(PROPOSAL, attempts("AMPK activation", "insulin", ""), settings(), AROUND)
    assert verdict["score"] == 0.5 * verdict["format"] + verdict["difficulty"] == 1.5
    assert verdict["attempts_correct"] == 1


def test_a_lost_attempt_is_neither_right_nor_wrong() -> None:
    judged = attempts("AMPK activation", "insulin")
    with_lost = judge(PROPOSAL, [*judged, attempt("", "solver")], settings(), AROUND)
    assert with_lost["difficulty"] == judge(PROPOSAL, judged, settings(), AROUND)["difficulty"] == 1
    assert with_lost["attempts_valid"] == 2
    wrong = judge(PROPOSAL, [*judged, attempt("no")], settings(), AROUND)
    assert wrong["attempts_valid"] == 3


@pytest.mark.parametrize("ended", sorted(LOST))
def test_too_few_judged_attempts_make_a_rollout_invalid_and_say_why(ended: str) -> None:
    tries = [attempt("AMPK activation"), attempt("", ended), attempt("", ended)]
    verdict = judge(PROPOSAL, tries, settings(), AROUND)
    assert (verdict["valid"], verdict["score"], verdict["difficulty"]) == (0, 0, 0)
    assert invalid_reason(tries, valid=False, lost="") == ended


def test_a_rollout_that_lost_its_search_is_invalid() -> None:
    assert judge(PROPOSAL, [], settings(), AROUND, lost="search")["valid"] == 0
    assert invalid_reason([], valid=False, lost="search") == "search"


def test_a_rollout_without_a_question_is_valid_and_earns_its_format_only() -> None:
    verdict = judge(Proposal(("<think>x</think>",), 1, 0, 0, ""), [], settings(format_form="graded"), AROUND)
    assert (verdict["valid"], verdict["difficulty"]) == (1, 0)


def test_the_biomedical_variant_adds_its_weighted_parts() -> None:
    tries = attempts("AMPK activation", "x", "y")
    paper = judge(PROPOSAL, tries, settings(), AROUND)
    biomedical = judge(PROPOSAL, tries, settings(variant="biomedical"), AROUND)
    weights = BiomedicalSettings()
    expected = (
        weights.citation_weight * biomedical["citations"]
        + weights.gene_weight * biomedical["genes"]
        + weights.reasoning_weight * biomedical["reasoning"]
        + weights.novelty_weight * biomedical["novelty"]
    )
    assert biomedical["citations"] == biomedical["novelty"] == 1
    assert biomedical["score"] - paper["score"] == pytest.approx(expected)


def test_every_part_is_measured_where_its_weight_is_zero() -> None:
    paper = judge(PROPOSAL, [], settings(), AROUND)
    biomedical = judge(PROPOSAL, [], settings(variant="biomedical"), AROUND)
    names = ("citations", "genes", "reasoning", "novelty")
    assert [paper[name] for name in names] == [biomedical[name] for name in names]
    assert paper["bonus"] == 0


def test_the_gate_cannot_be_bypassed_by_a_bonus() -> None:
    leaked = Proposal((TURN.replace("How does", "How does AMPK activation by"),), 1, 0, 0, PROPOSAL.evidence, ("7",))
    verdict = judge(leaked, [], settings(variant="biomedical"), AROUND)
    assert (verdict["citations"], verdict["score"]) == (1, 0)


@pytest.mark.parametrize("variant", ["paper", "biomedical"])
def test_a_question_that_holds_its_answer_is_not_attempted(variant: str) -> None:
    # In a training of 60 steps, 38 of the 57 questions that were paid a difficulty held their answer.
    turn = "<think>x</think><question>Which disease causes type 2 diabetes?</question><answer>Diabetes</answer>"
    leaked = Proposal((turn,), 1, 0, 0, "Diabetes is a disease.", ("7",))
    assert not worth_attempting(leaked, settings(variant=variant))
    assert worth_attempting(PROPOSAL, settings(variant=variant))


@pytest.mark.parametrize("form", ["graded", "gated"])
@pytest.mark.parametrize("variant", ["paper", "biomedical"])
def test_a_worked_examples_question_is_not_attempted_and_earns_nothing_for_itself(form: str, variant: str) -> None:
    chosen, around = settings(variant=variant), replace(AROUND, form=form)
    own, copied = PROPOSAL, replace(PROPOSAL, copied=True)
    assert worth_attempting(own, chosen)
    assert not worth_attempting(copied, chosen)
    verdict = judge(copied, [], chosen, around)
    assert verdict["copied"] == 1
    assert [verdict[f"format_{part}"] for part in ("integrity", "question", "answer", "answer_given")] == [0, 0, 0, 0]
    assert verdict["score"] == judge(Proposal(("<think>x</think>",), 1, 0, 0, ""), [], chosen, around)["score"]


def test_the_biomedical_variant_pays_difficulty_only_for_answers_that_were_read() -> None:
    guessed = replace(PROPOSAL, evidence="It lowers blood glucose.")
    assert worth_attempting(guessed, settings())
    assert not worth_attempting(guessed, settings(variant="biomedical"))
    assert worth_attempting(guessed, settings(variant="biomedical", biomedical={"grounded": False}))


def test_a_synonym_counts_in_the_biomedical_variant_and_exact_match_is_still_reported() -> None:
    proposal = Proposal((TURN.replace("AMPK activation (PMID 7)", "ERBB2"),), 1, 0, 0, "ERBB2", ("7",))
    tries = attempts("HER2", "EGFR", "KRAS")
    paper = judge(proposal, tries, settings(), AROUND)
    biomedical = judge(proposal, tries, settings(variant="biomedical"), AROUND)
    half = judge(proposal, tries, settings(variant="biomedical", biomedical={"synonym_credit": 0.5}), AROUND)
    assert (paper["attempts_credit"], biomedical["attempts_credit"], half["attempts_credit"]) == (0, 1, 0.5)
    assert biomedical["attempts_correct"] == 0


texts = st.text(max_size=60)


@given(
    st.lists(texts, max_size=3),
    st.lists(st.tuples(texts, st.sampled_from(ENDINGS)), max_size=5),
    st.sampled_from(["paper", "biomedical"]),
    st.sampled_from(["graded", "gated"]),
)
def test_any_verdict_is_within_range(turns: list[str], tries: list[tuple[str, str]], variant: str, form: str) -> None:
    around = Surroundings(form, ("an earlier question?",), lambda pmid: False)
    chosen = settings(variant=variant, attempts=5)
    verdict = judge(Proposal(tuple(turns), 2, 0, 0, "x"), [attempt(*one) for one in tries], chosen, around)
    most = 1.5 + (0.3 if variant == "biomedical" else 0)
    assert 0 <= verdict["score"] <= most
    assert verdict["valid"] or verdict["score"] == 0


@given(st.lists(st.tuples(texts, st.sampled_from(sorted(LOST))), max_size=4))
def test_lost_attempts_never_change_the_reward_of_what_was_judged(lost: list[tuple[str, str]]) -> None:
    judged = attempts("AMPK activation", "insulin", "AMPK activation")
    chosen = settings(attempts=7)
    with_lost = judge(PROPOSAL, [*judged, *[attempt(*one) for one in lost]], chosen, AROUND)
    assert with_lost["score"] == judge(PROPOSAL, judged, chosen, AROUND)["score"]
