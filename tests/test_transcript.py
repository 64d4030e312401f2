"""Reading model text: the last tag counts, broken calls are named, no text raises."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.matching import contains, exact_match, normalise
from shared.transcript import begins_with_thinking, last_tag, search_calls


def call(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


def test_the_last_complete_tag_counts() -> None:
    text = "<answer>first</answer> then <answer>second</answer> and <answer>open"
    assert last_tag(text, "answer") == "second"


@pytest.mark.parametrize("text", ["", "<answer>open", "</answer>", "</answer><answer>"])
def test_no_complete_tag_is_an_empty_answer(text: str) -> None:
    assert last_tag(text, "answer") == ""


def test_a_well_formed_call_gives_its_queries() -> None:
    text = call('{"name": "search", "arguments": {"query_list": ["tp53 ", "mdm2"]}}')
    assert search_calls(text)[0].queries == ("tp53", "mdm2")


@pytest.mark.parametrize(
    ("body", "broken"),
    [
        ("{oops", "not JSON"),
        ("[1]", "no arguments object"),
        ('{"name": "search"}', "no arguments object"),
        ('{"name": "look", "arguments": {"query_list": ["x"]}}', "unknown tool"),
        ('{"name": "search", "arguments": {"query_list": "x"}}', "query_list is no list of strings"),
        ('{"name": "search", "arguments": {"query_list": [1]}}', "query_list is no list of strings"),
        ('{"name": "search", "arguments": {"query_list": []}}', "empty query_list"),
        ('{"name": "search", "arguments": {"query_list": [" "]}}', "empty query_list"),
    ],
)
def test_a_broken_call_is_named(body: str, broken: str) -> None:
    found = search_calls(call(body))
    assert [one.broken for one in found] == [broken]
    assert found[0].queries == ()


@given(st.text())
def test_no_text_makes_the_parser_raise(text: str) -> None:
    for wrapped in (text, call(text), f"<think>{text}", f"<answer>{text}</answer>"):
        search_calls(wrapped)
        begins_with_thinking(wrapped)
        last_tag(wrapped, "answer")


def test_nesting_without_end_does_not_raise() -> None:
    assert search_calls(call("[" * 100_000))[0].broken == "not JSON"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("<think>so</think> x", True), (" <think> so </think>", True), ("<think> </think>", False), ("so", False)],
)
def test_thinking_must_come_first_and_not_be_empty(text: str, expected: bool) -> None:
    assert begins_with_thinking(text) is expected


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("Apoptosis.", "apoptosis", True),
        ("The MAPK pathway", "MAPK pathway", True),
        ("MAPK", "MAPK pathway", False),
        ("", "", False),
    ],
)
def test_exact_match_is_on_normalised_text_and_never_on_nothing(left: str, right: str, same: bool) -> None:
    assert exact_match(left, right) is same


def test_contains_looks_at_whole_words() -> None:
    assert contains("BCR-ABL1 is a fusion protein.", "bcr-abl1")
    assert not contains("insulin", "in")
    assert normalise("  The  p53!  ") == "p53"
