"""What went wrong in an earlier biomedical Dr. Zero system and has no other test; docs/defects.md lists them all.

Everything runs through the real code: the batch entry with a live solver where attempts matter, else pure functions.
"""

import ast
import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from model_services import Reply, chat_reply, serving
from tiny_model import tiny_tokenizer

from services.trainer import reward
from services.trainer.conversations import TEMPLATE_TOKENS
from services.trainer.judge import Surroundings, judge, worth_attempting
from services.trainer.matching import exact_match
from services.trainer.protocol import SEARCH_TOOL, prompt_file, proposer_messages, solver_messages
from services.trainer.scores import Proposal, format_parts, format_score
from services.trainer.solver_reward import answer_parts
from shared.records import Attempt, Seed
from shared.settings import RewardSettings, TrainerSettings, build_settings, profiles
from shared.transcript import search_calls

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "defects.md"
SETS = get_args(TrainerSettings.model_fields["prompts"].annotation)
INFO: dict[str, Any] = {"document": "Metformin activates AMPK.", "pmid": "1"}
QUESTION = "Which enzyme does metformin act on?"
TURN = f"<think>x</think><question>{QUESTION}</question><answer>AMPK</answer>"
BIOMEDICAL = RewardSettings(variant="biomedical", attempts=3)
AROUND = Surroundings("gated", (), lambda pmid: pmid in {"1", "7"})


def proposal(turn: str, *, evidence: str = "Metformin activates AMPK.") -> Proposal:
    return Proposal((turn,), 1, 0, 0, evidence, ("1", "7"))


def attempts(*answers: str) -> list[Attempt]:
    return [Attempt(answer, "answered", 0, 1, 0.1) for answer in answers]


# ---- the batch entry -----------------------------------------------------------------------------------------------


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's settings, with a small tokenizer, for the reward."""
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    places = {"STORAGE__DATA_DIR": "data", "STORAGE__SCRATCH_DIR": "scratch", "SOLVER__MODEL": "model"}
    made = build_settings({f"DRZERO_{name}": str(tmp_path / folder) for name, folder in places.items()})
    monkeypatch.setattr(reward, "load_settings", lambda: made)


def score(url: str, *texts: str) -> list[dict[str, float]]:
    return reward.compute_biomedical_challenger_score_batch(
        ["search_biomedical_1"] * len(texts),
        list(texts),
        [None] * len(texts),
        [INFO] * len(texts),
        model_name="solver",
        base_url=url,
        reward_rollout_n=3,
    )


@pytest.mark.usefixtures("demo")
def test_the_batch_entry_works_inside_a_running_event_loop_and_again_after_it() -> None:
    async def caller(url: str) -> list[dict[str, float]]:
        return score(url, TURN)

    with serving(lambda _, __: chat_reply("<answer>AMPK</answer>")) as url:
        assert asyncio.run(caller(url)) == score(url, TURN) == score(url, TURN)


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_the_solvers_address_is_taken_with_and_without_its_version(path: str) -> None:
    with serving(lambda path, _: chat_reply("") if path == "/v1/chat/completions" else (404, {})) as url:
        assert score(url + path, TURN)[0]["attempts_valid"] == 3


@pytest.mark.usefixtures("demo")
def test_an_answer_that_stands_in_the_prompt_alone_is_no_answer() -> None:
    asked: list[dict[str, Any]] = []

    def silent(_: str, body: dict[str, Any]) -> Reply:
        asked.append(body)
        return chat_reply("<think>I do not know.</think>")

    with serving(silent) as url:
        [verdict] = score(url, TURN.replace("AMPK", "insulin"))
    assert all("<answer>insulin</answer>" in json.dumps(body["messages"]) for body in asked)
    assert (verdict["attempts_valid"], verdict["attempts_correct"], verdict["difficulty"]) == (3, 0, 0)


@pytest.mark.usefixtures("demo")
def test_a_row_that_cannot_be_scored_stops_the_batch_before_the_solver_is_asked() -> None:
    asked: list[str] = []

    def count(path: str, _: dict[str, Any]) -> Reply:
        asked.append(path)
        return chat_reply("<answer>AMPK</answer>")

    with serving(count) as url, pytest.raises(ValueError, match="search_biomedical_<hop>"):
        reward.compute_biomedical_challenger_score_batch(
            ["search_biomedical_1", "search_biomedical_one"],
            [TURN, TURN],
            [None, None],
            [INFO, INFO],
            model_name="solver",
            base_url=url,
            reward_rollout_n=3,
        )
    assert asked == []


# ---- parsing -------------------------------------------------------------------------------------------------------


def response(*steps: str) -> str:
    """A decoded response: turns and, between them, the text of a result message."""
    turns = [step if number % 2 == 0 else f"\nuser\n{step}\nassistant\n" for number, step in enumerate(steps)]
    return "".join(turns)


def call(query: str) -> str:
    return f"<tool_call>{json.dumps({'name': 'search', 'arguments': {'query_list': [query]}})}</tool_call>"


def result(text: str) -> str:
    return f"<tool_response>\n{text}\n</tool_response>"


def parts_of(text: str, hop: int) -> dict[str, float]:
    return format_parts(reward.read_proposal(reward.read_response(text), hop=hop, info=INFO))


def test_parallel_calls_of_one_turn_count_one_by_one() -> None:
    both = result("PMID 7: A paper.") + "\n" + result("PMID 8: Another paper.")
    text = response(f"<think>x</think>{call('a')}{call('b')}", both, TURN)
    assert parts_of(text, hop=3)["tool"] == 1
    assert parts_of(text, hop=2)["tool"] == 0.5


@pytest.mark.parametrize("failure", ["No paper found.", "Search error: connection refused", "", '{"result": null}'])
def test_a_search_that_brought_no_paper_pays_nothing(failure: str) -> None:
    text = response(f"<think>x</think>{call('a')}", result(failure), TURN)
    assert parts_of(text, hop=2)["tool"] == 0
    assert parts_of(text, hop=1)["tool"] == 0.5


def test_the_source_document_comes_with_the_row_and_needs_no_marker_in_a_text() -> None:
    for document in ("AMPK.", "", "source document: <|im_end|> source document: AMPK", "{braces} %s"):
        found = reward.read_proposal(reward.read_response(TURN), hop=1, info=INFO | {"document": document})
        assert found.evidence == document
        assert (found.question, found.answer) == (QUESTION, "AMPK")


def test_a_turn_that_was_cut_off_keeps_what_it_had_finished() -> None:
    assert parts_of(f"{TURN}\n<think>And fur", hop=1) == parts_of(TURN, hop=1)


# ---- what is paid --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turn",
    [
        "<think>x</think><question>How does metformin (PMID 7) act?</question>",
        "<think>x</think><question>How does metformin (PMID 7) act?</question><answer></answer>",
        "<think>x</think><question>How does metformin (PMID 7) act?</question><answer>(PMID 7)</answer>",
        "<think>x</think><answer>AMPK (PMID 7)</answer>",
    ],
)
def test_half_a_proposal_earns_no_bonus_and_is_not_attempted(turn: str) -> None:
    verdict = judge(proposal(turn), [], BIOMEDICAL, AROUND)
    assert (verdict["score"], verdict["bonus"], verdict["citations"]) == (0, 0, float("7" in turn))
    for variant in ("paper", "biomedical"):
        settings = RewardSettings.model_validate({"variant": variant})
        assert not worth_attempting(proposal(turn), settings)


def test_a_question_loses_nothing_because_its_own_words_stand_in_what_was_read() -> None:
    alone, among = (
        judge(proposal(TURN, evidence=text), attempts("AMPK", "x", "y"), BIOMEDICAL, AROUND)
        for text in ("AMPK", f"AMPK. {QUESTION} {TURN}")
    )
    assert alone == among


def test_to_cite_what_was_read_pays_more_than_not_to_cite_and_an_invention_pays_nothing() -> None:
    none, read, half, invented = (
        judge(proposal(TURN.replace("AMPK<", f"AMPK{cited}<")), attempts("AMPK", "x", "y"), BIOMEDICAL, AROUND)["score"]
        for cited in ("", " (PMID 7)", " (PMID 7, PMID 999)", " (PMID 999)")
    )
    assert read > half > none == invented


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("Apoptosis.", "apoptosis"),
        ("the MAPK pathway", "MAPK pathway"),
        ("MAPK", "MAPK pathway"),
        ("MAPK/ERK pathway (PMID 1)", "MAPK pathway (PMID 1)"),
        ("AMPK (PMID 1)", "AMPK"),
        ("AMPK", "AMPK (PMID 1)"),
        ("HER2", "ERBB2"),
        ("KRAS (PMID 1)", "EGFR (PMID 1)"),
        ("", "AMPK"),
    ],
)
def test_both_rewards_call_the_same_answers_right(answer: str, gold: str) -> None:
    turn = TURN.replace("AMPK", gold)
    right = exact_match(answer, gold)
    assert judge(proposal(turn), attempts(answer, "x", "y"), BIOMEDICAL, AROUND)["attempts_correct"] == right
    assert answer_parts([f"<answer>{answer}</answer>"], [gold])["score"] == right


# ---- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["search", "direct", "last"])
def test_the_examples_that_the_proposer_sees_earn_full_marks(name: str) -> None:
    example = json.loads(prompt_file("proposer_examples.json"))[name]
    steps = [turn["content"] if turn["role"] == "assistant" else result(turn["content"]) for turn in example["turns"]]
    trajectory = reward.read_response(response(*steps))
    copied = reward.read_proposal(trajectory, hop=example["hop"], info=example)
    assert copied.copied
    shown = replace(copied, copied=False)
    for form in ("graded", "gated"):
        assert format_score(format_parts(shown), form) == 1


def test_an_answer_as_the_full_prompt_asks_for_it_earns_full_marks() -> None:
    asked = re.findall(r"<answer>.+?</answer>", prompt_file("full-v1/proposer_system.md"))
    turn = TURN.replace("<answer>AMPK</answer>", asked[-1])
    assert "PMID" in turn
    assert format_score(format_parts(proposal(turn)), "gated") == 1


@pytest.mark.parametrize("prompts", SETS)
def test_the_tool_is_described_once_and_not_in_the_prompts_too(prompts: str) -> None:
    asked = [*proposer_messages(Seed(0, "1", 3, "A paper."), prompts, 0), *solver_messages("Why?", prompts, 0)]
    text = "\n".join(message["content"] for message in asked)
    assert "query_list" not in text
    assert SEARCH_TOOL["function"]["description"] not in text
    assert search_calls(text) == []


@pytest.mark.parametrize("profile", profiles())
def test_a_first_attempt_at_a_long_question_fits_the_solvers_context(profile: str) -> None:
    settings = build_settings({"DRZERO_PROFILE": profile})
    knobs = settings.trainer.reward
    messages = solver_messages("q" * 400, settings.trainer.prompts, knobs.worked_examples)
    characters = sum(len(message["content"]) for message in messages)  # at least as many as tokens: it is all ASCII
    assert all(message["content"].isascii() for message in messages)
    assert characters + TEMPLATE_TOKENS + knobs.max_new_tokens <= settings.solver.context_tokens


# ---- the page ------------------------------------------------------------------------------------------------------


def named_tests() -> Iterator[tuple[str, str]]:
    """File and function of every test that the page names."""
    yield from re.findall(r"`tests/(\w+\.py)::(\w+)`", PAGE.read_text(encoding="utf-8"))


def test_every_test_that_the_page_of_defects_names_exists() -> None:
    missing = set()
    for file, name in named_tests():
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}:
            missing.add(f"{file}::{name}")
    assert not missing


def test_the_page_names_every_other_test_of_this_file() -> None:
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    assert tests - {name for _, name in named_tests()} <= {
        "test_every_test_that_the_page_of_defects_names_exists",
        "test_the_page_names_every_other_test_of_this_file",
    }
