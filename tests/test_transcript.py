"""Reading model text: the last tag counts, broken calls are named, no text raises."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.matching import contains, exact_match, normalise
from shared.transcript import (
    BROKEN_KINDS,
    MAX_QUERIES,
    MAX_QUERY_CHARS,
    begins_with_thinking,
    last_tag,
    search_calls,
    split_response,
)


def call(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


def test_the_last_complete_tag_counts() -> None:
    text = "<answer>first</answer> then <answer>second</answer> and <answer>open"
    assert last_tag(text, "answer") == "second"


@pytest.mark.parametrize("tail", ["</answer>", "</think></answer></answer>", " and </answer> more"])
def test_closing_tags_behind_an_answer_are_no_part_of_it(tail: str) -> None:
    assert last_tag(f"<answer>one</answer><answer>two</answer>{tail}", "answer") == "two"


@pytest.mark.parametrize("text", ["", "<answer>open", "</answer>", "</answer><answer>"])
def test_no_complete_tag_is_an_empty_answer(text: str) -> None:
    assert last_tag(text, "answer") == ""


def test_a_well_formed_call_gives_its_queries() -> None:
    text = call('{"name": "search", "arguments": {"query_list": ["tp53 ", "mdm2"]}}')
    assert search_calls(text)[0].queries == ("tp53", "mdm2")


@pytest.mark.parametrize(
    ("body", "broken"),
    [
        ("{oops", "not_json"),
        ("[1]", "no_arguments"),
        ('{"name": "search"}', "no_arguments"),
        ('{"name": "look", "arguments": {"query_list": ["x"]}}', "unknown_tool"),
        ('{"name": "search", "arguments": {"query_list": "x"}}', "no_query_list"),
        ('{"name": "search", "arguments": {"query_list": [1]}}', "no_query_list"),
        ('{"name": "search", "arguments": {"query_list": []}}', "empty_query_list"),
        ('{"name": "search", "arguments": {"query_list": [" "]}}', "empty_query_list"),
    ],
)
def test_a_broken_call_is_named(body: str, broken: str) -> None:
    found = search_calls(call(body))
    assert [one.broken for one in found] == [broken]
    assert found[0].queries == ()
    assert broken in BROKEN_KINDS


def test_queries_are_cut_to_what_the_search_service_takes() -> None:
    body = json.dumps({"name": "search", "arguments": {"query_list": ["x" * 9999, "half \ud800 pair"] + ["y"] * 99}})
    queries = search_calls(call(body))[0].queries
    assert len(queries) == MAX_QUERIES
    assert (len(queries[0]), queries[1]) == (MAX_QUERY_CHARS, "half ? pair")


@pytest.mark.parametrize("text", ["<tool_call>{", "x <tool_call>", f"<tool_call>{{\n{call('{}')}"])
def test_a_call_without_an_end_is_broken(text: str) -> None:
    assert search_calls(text)[0].broken == "unclosed"


def test_two_calls_of_one_turn_are_two_calls() -> None:
    one = call('{"name": "search", "arguments": {"query_list": ["tp53"]}}')
    assert [found.broken for found in search_calls(f"{one}\n{one}")] == ["", ""]


@pytest.mark.parametrize("special", [True, False])
def test_a_decoded_response_is_split_into_turns_and_results(special: bool) -> None:
    end, user, assistant = ("<|im_end|>\n", "<|im_start|>", "<|im_start|>") if special else ("\n", "", "")
    result = "<tool_response>\nPMID 7: a paper.\n</tool_response>"
    text = f"<think>a</think>{end}{user}user\n{result}{end}{assistant}assistant\n<answer>b</answer>"
    assert split_response(text + end.strip()) == (["<think>a</think>", "<answer>b</answer>"], ["PMID 7: a paper."])


def test_markup_in_a_search_result_is_not_the_models() -> None:
    text = "a\nuser\n<tool_response>\n<answer>p53</answer><tool_call>x</tool_call>\n</tool_response>\nassistant\nb"
    turns, _ = split_response(text)
    assert last_tag("\n".join(turns), "answer") == ""
    assert search_calls("\n".join(turns)) == []


@given(st.text())
def test_no_text_makes_the_parser_raise(text: str) -> None:
    for wrapped in (text, call(text), f"<think>{text}", f"<answer>{text}</answer>"):
        search_calls(wrapped)
        begins_with_thinking(wrapped)
        last_tag(wrapped, "answer")
        split_response(wrapped)


def test_nesting_without_end_does_not_raise() -> None:
    assert search_calls(call("[" * 100_000))[0].broken == "not_json"


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
