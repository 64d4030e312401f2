"""The solver's reward: exact match of its own last answer."""

import pytest

from services.trainer.solver_reward import answer_parts


@pytest.mark.parametrize(
    ("written", "score"),
    [
        ("<answer>TP53</answer>", 1),
        ("<answer>MDM2</answer> no, <answer>the TP53.</answer>", 1),
        ("<answer>TP53</answer> no, <answer>MDM2</answer>", 0),
        ("TP53", 0),
        ("", 0),
    ],
)
def test_the_last_answer_is_compared_after_normalisation(written: str, score: float) -> None:
    parts = answer_parts([written], ["TP53"])
    assert parts["score"] == parts["exact_match"] == score


def test_the_last_answer_of_the_last_turn_that_has_one_counts() -> None:
    assert (
        answer_parts(["<answer>MDM2</answer>", "<answer>TP53</answer>", "<think>Done.</think>"], ["TP53"])["score"] == 1
    )


def test_any_of_several_gold_answers_is_right() -> None:
    assert answer_parts(["<answer>TP53</answer>"], ["MDM2", "TP53"])["score"] == 1


def test_a_synonym_is_measured_and_not_paid() -> None:
    parts = answer_parts(["<answer>HER2</answer>"], ["ERBB2"])
    assert (parts["score"], parts["biomedical_match"]) == (0, 1)


def test_a_turn_without_an_answer_is_no_answer() -> None:
    assert answer_parts(["I do not know."], ["TP53"])["answered"] == 0
    assert answer_parts([], ["TP53"])["answered"] == 0


@pytest.mark.parametrize("golds", [[], [""], ["TP53", ""]])
def test_a_row_without_a_gold_answer_is_an_error(golds: list[str]) -> None:
    with pytest.raises(ValueError, match="gold answer"):
        answer_parts(["<answer></answer>"], golds)
