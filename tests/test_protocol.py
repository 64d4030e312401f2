"""What the models are told, and the form a guided first turn takes."""

import json
import re

import pytest

from services.trainer.protocol import GUIDED_CALL, prompt_hash, proposer_messages, render_results, solver_messages
from shared.records import Hit, Paper, Seed
from shared.transcript import search_calls

PAPER = Paper("990000001", "Imatinib", "Imatinib blocks BCR-ABL1. " * 50)


def test_a_guided_turn_is_one_well_formed_call() -> None:
    body = json.dumps({"name": "search", "arguments": {"query_list": ["BCR-ABL1 origin"]}})
    turn = f"<think>I look for the gene.</think>\n<tool_call>\n{body}\n</tool_call>"
    assert re.fullmatch(GUIDED_CALL, turn)
    assert search_calls(turn)[0].queries == ("BCR-ABL1 origin",)


@pytest.mark.parametrize("max_chars", [80, 500, 5000])
def test_results_show_pmids_and_keep_to_the_budget(max_chars: int) -> None:
    text = render_results(["a", "b"], [[Hit(PAPER, 0.9)], [Hit(PAPER, 0.8)]], max_chars)
    assert len(text) <= max_chars
    assert "PMID" in text


def test_a_query_without_papers_says_so() -> None:
    assert render_results(["a"], [[]], 100) == "No paper found."


@pytest.mark.parametrize("examples", [0, 1, 2])
def test_the_request_comes_last_and_carries_pmid_and_hops(examples: int) -> None:
    messages = proposer_messages(Seed(0, "123", 3, "A paper."), examples)
    assert messages[0]["role"] == "system"
    assert messages[-1]["role"] == "user"
    assert "Hops: 3. Searches: 2." in messages[-1]["content"]
    assert "PMID 123" in messages[-1]["content"]
    assert sum(m["role"] == "user" for m in messages) == examples + 1


def test_the_example_with_a_search_is_shown_for_more_than_one_hop() -> None:
    def roles(hop: int) -> list[str]:
        return [m["role"] for m in proposer_messages(Seed(0, "1", hop, "x"), 2)]

    assert "tool" in roles(2)
    assert "tool" not in roles(1)


def test_the_solver_is_asked_the_question() -> None:
    assert solver_messages("Why?", 1)[-1]["content"] == "Question: Why?"


def test_prompts_have_a_version() -> None:
    assert prompt_hash("proposer") != prompt_hash("solver")
