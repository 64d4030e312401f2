"""The reward of a rollout through live services: its parts, its attempts, and that an outage is never a score."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from model_services import chat_reply, search_reply, serving

from services.trainer import outage, reward
from services.trainer.paths import run_paths
from shared.clients import BadReply, Unavailable
from shared.settings import Settings, build_settings

TURN = "<think>x</think><question>Which kinase does metformin activate?</question><answer>AMPK</answer>"
CALL = '<tool_call>{"name": "search", "arguments": {"query_list": ["metformin"]}}</tool_call>'


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    made = build_settings(
        {
            "DRZERO_STORAGE__DATA_DIR": str(tmp_path / "data"),
            "DRZERO_STORAGE__SCRATCH_DIR": str(tmp_path / "scratch"),
            "DRZERO_TRAINER__PATIENCE_S": "0.5",
        }
    )
    for module in (reward, outage):
        monkeypatch.setattr(module, "load_settings", lambda: made_at(made))
    return made


ADDRESSES: dict[str, str] = {}


def made_at(settings: Settings) -> Settings:
    """The settings with the addresses of this test's services."""
    solver = settings.solver.model_copy(update={"url": ADDRESSES.get("solver", settings.solver.url)})
    retrieval = settings.retrieval.model_copy(update={"url": ADDRESSES.get("search", settings.retrieval.url)})
    return settings.model_copy(update={"solver": solver, "retrieval": retrieval})


def score(turn: str, hop: int = 1) -> dict[str, Any]:
    trajectory = {"step": 1, "turns": [turn], "searches": [], "trained_tokens": 9}
    info = {
        "trajectory": json.dumps(trajectory),
        "document": "Metformin activates AMPK.",
        "split": "train",
        "index": 0,
        "pmid": "1",
    }
    return asyncio.run(reward.compute_score(f"search_biomedical_{hop}", turn, "", info))


def test_the_parts_and_the_attempts_make_the_score(settings: Settings) -> None:
    answers = iter(["<answer>AMPK</answer>", "<answer>mTOR</answer>", "no idea"])

    def solve(_: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        assert body["messages"][-1]["content"].startswith("Question: Which kinase")
        return chat_reply(next(answers))

    with serving(solve) as ADDRESSES["solver"]:
        verdict = score(TURN)
    assert verdict["attempts_made"] == 3
    assert verdict["attempts_correct"] == 1
    assert verdict["difficulty"] == 1
    assert verdict["score"] == pytest.approx(0.5 * verdict["format"] + 1)
    written = [json.loads(line) for path in run_paths(settings).log.iterdir() for line in path.read_text().splitlines()]
    assert {a["ended"] for a in written[0]["attempts"]} == {"answered", "no_answer"}


def test_an_attempt_may_search_and_goes_on_with_what_it_found(settings: Settings) -> None:
    turns: Counter[str] = Counter()

    def solve(_: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        last = body["messages"][-1]
        turns[last["role"]] += 1
        return chat_reply(CALL if last["role"] == "user" else "<answer>AMPK</answer>")

    def search(_: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return search_reply(body["queries"], "7")

    with serving(solve) as ADDRESSES["solver"], serving(search) as ADDRESSES["search"]:
        verdict = score(TURN)
    assert turns == {"user": 3, "tool": 3}
    assert verdict["attempts_correct"] == 3
    assert verdict["difficulty"] == 0


def test_without_a_question_the_solver_is_not_asked(settings: Settings) -> None:
    ADDRESSES["solver"] = "http://127.0.0.1:9"
    assert score("no tags")["attempts_made"] == 0


def test_a_solver_that_stays_away_is_an_outage_and_never_a_score(settings: Settings) -> None:
    ADDRESSES["solver"] = "http://127.0.0.1:9"
    with pytest.raises(Unavailable, match="solver"):
        score(TURN)
    assert "solver" in (outage.read_outage(run_paths(settings).outage) or "")


def test_a_search_that_stays_away_during_an_attempt_is_an_outage(settings: Settings) -> None:
    ADDRESSES["search"] = "http://127.0.0.1:9"
    with serving(lambda _, __: chat_reply(CALL)) as ADDRESSES["solver"], pytest.raises(Unavailable, match="retrieval"):
        score(TURN)
    assert "retrieval" in (outage.read_outage(run_paths(settings).outage) or "")


def test_garbage_from_the_solver_is_no_score(settings: Settings) -> None:
    with serving(lambda _, __: (200, {"oops": 1})) as ADDRESSES["solver"], pytest.raises(BadReply, match="solver"):
        score(TURN)


def test_an_unknown_data_source_is_an_error() -> None:
    assert reward.hop_of("search_biomedical_3") == 3
    with pytest.raises(ValueError, match="search_biomedical_<hop>"):
        reward.hop_of("gsm8k")
