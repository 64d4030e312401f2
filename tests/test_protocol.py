"""What the models are told, and the form a guided first turn takes."""

import json
import re
from typing import get_args

import pytest

from services.trainer.protocol import (
    GUIDED_CALL,
    last_turn_note,
    prompt_hash,
    proposer_messages,
    render_results,
    solver_messages,
)
from shared.records import Hit, Paper, Seed
from shared.settings import TrainerSettings
from shared.transcript import begins_with_thinking, search_calls

SETS = get_args(TrainerSettings.model_fields["prompts"].annotation)
PAPER = Paper("990000001", "Imatinib", "Imatinib blocks BCR-ABL1. " * 50)


def test_a_guided_turn_is_one_well_formed_call() -> None:
    body = json.dumps({"name": "search", "arguments": {"query_list": ["BCR-ABL1 origin"]}})
    turn = f"<think>I look for the gene.</think>\n<tool_call>\n{body}\n</tool_call>"
    assert re.fullmatch(GUIDED_CALL, turn)
    assert search_calls(turn)[0].queries == ("BCR-ABL1 origin",)


def words(text: str, count: int) -> str:
    """A stand-in for a tokenizer whose tokens are words."""
    return " ".join(text.split(" ")[:count])


@pytest.mark.parametrize("max_words", [20, 60, 500])
def test_results_show_pmids_and_keep_to_the_budget(max_words: int) -> None:
    text = render_results(["a", "b"], [[Hit(PAPER, 0.9)], [Hit(PAPER, 0.8)]], words, max_words)
    assert len(text.split(" ")) <= max_words
    assert text.count("PMID 990000001") == 2


def test_a_query_without_papers_says_so() -> None:
    assert render_results(["a"], [[]], words, 100) == "No paper found."


@pytest.mark.parametrize("prompts", SETS)
@pytest.mark.parametrize("examples", [0, 1, 2])
def test_the_request_comes_last_and_carries_pmid_and_hops(prompts: str, examples: int) -> None:
    messages = proposer_messages(Seed(0, "123", 3, "A {braced} paper."), prompts, examples)
    assert messages[0]["role"] == "system"
    assert messages[-1]["role"] == "user"
    assert re.search(r"Hops: 3\. Searches: (exactly )?2\.", messages[-1]["content"])
    assert "A {braced} paper." in messages[-1]["content"]
    assert "PMID 123" in messages[-1]["content"]
    assert sum(m["role"] == "user" for m in messages) == examples + 1


def test_the_example_with_a_search_is_shown_for_more_than_one_hop() -> None:
    def roles(hop: int) -> list[str]:
        return [m["role"] for m in proposer_messages(Seed(0, "1", hop, "x"), "short-v1", 2)]

    assert "tool" in roles(2)
    assert "tool" not in roles(1)


def test_the_solver_is_asked_the_question() -> None:
    for prompts in SETS:
        assert solver_messages("Why {x}?", prompts, 1)[-1]["content"] == "Question: Why {x}?"


def test_each_set_of_prompts_has_a_version_and_a_hash_of_its_own() -> None:
    assert all(re.fullmatch(r"[a-z]+-v\d+", prompts) for prompts in SETS)
    assert len({prompt_hash(role, prompts) for role in ("proposer", "solver") for prompts in SETS}) == 2 * len(SETS)


def test_the_full_prompts_define_one_to_four_hops() -> None:
    text = proposer_messages(Seed(0, "1", 1, "x"), "full-v1", 0)[0]["content"]
    assert all(f"{hops} hop" in text for hops in (1, 2, 3, 4))


def test_worked_examples_follow_the_protocol_they_show() -> None:
    for hop in (1, 2):
        messages = proposer_messages(Seed(0, "1", hop, "x"), "short-v1", 2)
        written = [m["content"] for m in messages if m["role"] == "assistant"]
        assert all(begins_with_thinking(turn) for turn in written)
        assert not [call for turn in written for call in search_calls(turn) if call.broken]


@pytest.mark.parametrize("role", ["proposer", "solver"])
def test_the_last_turn_is_announced(role: str) -> None:
    assert "last turn" in last_turn_note(role)
