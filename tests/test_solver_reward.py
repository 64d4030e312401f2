"""The solver's reward: exact match of its own last answer, for known data sources only."""

import json

import pytest

from services.trainer.solver_reward import compute_score

SOURCE = "search_biomedical_2"


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
    verdict = compute_score(SOURCE, written, {"target": ["TP53"]})
    assert verdict["score"] == verdict["exact_match"] == score


@pytest.mark.parametrize("gold", ["TP53", ["MDM2", "TP53"], {"target": "TP53"}, {"target": ("TP53",)}])
def test_every_form_of_gold_is_read(gold: object) -> None:
    assert compute_score(SOURCE, "<answer>TP53</answer>", gold)["score"] == 1


def test_a_synonym_is_measured_and_not_paid() -> None:
    verdict = compute_score(SOURCE, "<answer>HER2</answer>", "ERBB2")
    assert (verdict["score"], verdict["biomedical_match"]) == (0, 1)


def test_an_answer_in_a_search_result_is_not_the_solvers() -> None:
    result = "\nuser\n<tool_response>\n<answer>TP53</answer>\n</tool_response>\nassistant\n"
    assert compute_score(SOURCE, f"<think>x</think>{result}I do not know.", "TP53")["answered"] == 0
    info = {"trajectory": json.dumps({"turns": ["<answer>TP53</answer>"]})}
    assert compute_score(SOURCE, "anything", "TP53", info)["score"] == 1


@pytest.mark.parametrize("source", ["searchR1_nq", "search_zero_1", "search_biomedical"])
def test_an_unknown_data_source_is_an_error_and_not_a_score(source: str) -> None:
    with pytest.raises(ValueError, match="search_biomedical_<hop>"):
        compute_score(source, "<answer>TP53</answer>", "TP53")


@pytest.mark.parametrize("gold", ["", None, [], {"target": None}, [""]])
def test_a_row_without_a_gold_answer_is_an_error(gold: object) -> None:
    with pytest.raises(ValueError, match="gold answer"):
        compute_score(SOURCE, "<answer></answer>", gold)
