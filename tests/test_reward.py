"""The reward of a rollout through live services: its parts, its attempts; an outage is never a wrong answer."""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from model_services import chat_reply, search_reply, serving
from tiny_model import tiny_tokenizer

from services.trainer import reward
from services.trainer.paths import run_paths
from services.trainer.protocol import hop_of
from shared.settings import Settings, build_settings, changed

TURN = "<think>x</think><question>Which enzyme does metformin act on?</question><answer>AMPK</answer>"
CALL = '<tool_call>{"name": "search", "arguments": {"query_list": ["metformin"]}}</tool_call>'


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    made = build_settings(
        {
            "DRZERO_STORAGE__DATA_DIR": str(tmp_path / "data"),
            "DRZERO_STORAGE__SCRATCH_DIR": str(tmp_path / "scratch"),
            "DRZERO_SOLVER__MODEL": str(tmp_path / "model"),
            "DRZERO_TRAINER__REWARD__ATTEMPT_DEADLINE_S": "2",
        }
    )
    monkeypatch.setattr(reward, "load_settings", lambda: made_at(made))
    return made


ADDRESSES: dict[str, str] = {}


def made_at(settings: Settings) -> Settings:
    """The settings with the addresses of this test's services."""
    solver = settings.solver.model_copy(update={"url": ADDRESSES.get("solver", settings.solver.url)})
    retrieval = settings.retrieval.model_copy(update={"url": ADDRESSES.get("search", settings.retrieval.url)})
    return settings.model_copy(update={"solver": solver, "retrieval": retrieval})


INFO = {"document": "Metformin activates AMPK.", "split": "train", "index": 0, "pmid": "1"}


def score(
    turn: str,
    hop: int = 1,
    lost: str = "",
    measured: dict[str, float] | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The numbers of a rollout of one turn, once it is judged; `measured` and `more` go to trajectory and info."""
    trajectory = {"step": 1, "turns": [turn], "searches": [], "trained_tokens": 9, "lost": lost, **(measured or {})}
    info = INFO | dict(more or {}) | {"trajectory": json.dumps(trajectory)}

    async def compute() -> dict[str, Any]:
        judging = reward.judging_of_this_loop()
        try:
            numbers = await reward.compute_score(f"search_biomedical_{hop}", turn, "", info)
            late = await asyncio.gather(*judging.late)
            return late[0][0] if late else numbers
        finally:
            await judging.close()

    return asyncio.run(compute())


def written(settings: Settings) -> list[dict[str, Any]]:
    """The verdicts in the run's log."""
    return [json.loads(line) for path in run_paths(settings).log.iterdir() for line in path.read_text().splitlines()]


def test_the_parts_and_the_attempts_make_the_score(settings: Settings) -> None:
    answers = iter(["<answer>AMPK</answer>", "<answer>mTOR</answer>", "no idea"])

    def solve(_: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        assert body["messages"][-1]["content"].startswith("Question: Which enzyme")
        return chat_reply(next(answers))

    with serving(solve) as ADDRESSES["solver"]:
        verdict = score(TURN)
    assert verdict["attempts_made"] == 3
    assert verdict["attempts_correct"] == 1
    assert verdict["difficulty"] == 1
    assert verdict["score"] == pytest.approx(0.5 * verdict["format"] + 1)
    verdict = written(settings)[0]
    assert {a["ended"] for a in verdict["attempts"]} == {"answered", "no_answer"}
    assert [a["seed"] for a in verdict["attempts"]] == reward.attempt_seeds(42, 1, verdict["question"], 3)
    assert (verdict["valid"], verdict["invalid_reason"], verdict["reasoning_type"]) == (1, "", "entity")


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


def test_a_solver_that_stays_away_makes_the_rollout_invalid_and_not_wrong(settings: Settings) -> None:
    ADDRESSES["solver"] = "http://127.0.0.1:9"
    verdict = score(TURN)
    assert (verdict["valid"], verdict["score"], verdict["attempts_valid"]) == (0, 0, 0)
    assert written(settings)[0]["invalid_reason"] == "solver"


def test_a_search_that_stays_away_during_an_attempt_makes_the_rollout_invalid(settings: Settings) -> None:
    ADDRESSES["search"] = "http://127.0.0.1:9"
    with serving(lambda _, __: chat_reply(CALL)) as ADDRESSES["solver"]:
        assert score(TURN)["valid"] == 0
    assert written(settings)[0]["invalid_reason"] == "search"


def test_garbage_from_the_solver_is_no_wrong_answer(settings: Settings) -> None:
    with serving(lambda _, __: (200, {"oops": 1})) as ADDRESSES["solver"]:
        assert score(TURN)["valid"] == 0


def test_a_rollout_that_lost_its_search_is_not_sent_to_the_solver(settings: Settings) -> None:
    ADDRESSES["solver"] = "http://127.0.0.1:9"
    verdict = score(TURN, lost="search")
    assert (verdict["valid"], verdict["attempts_made"]) == (0, 0)
    assert written(settings)[0]["invalid_reason"] == "search"


def test_a_rollout_cut_off_by_its_deadline_is_invalid_and_not_wrong(settings: Settings) -> None:
    ADDRESSES["solver"] = "http://127.0.0.1:9"
    verdict = score("", lost="deadline")
    assert (verdict["valid"], verdict["attempts_made"]) == (0, 0)
    assert written(settings)[0]["invalid_reason"] == "deadline"


def test_the_verdict_keeps_the_times_of_its_rollout_and_none_that_it_was_not_told(settings: Settings) -> None:
    times = {"seconds_generating": 2.5, "seconds_searching": 0.5, "generated": 1.75e9}
    numbers = score("no tags", measured=times)
    score("no tags")
    told, untold = written(settings)
    assert {name: told.get(name) for name in times} == times
    assert not times.keys() & (untold.keys() | numbers.keys())


def test_one_lost_attempt_leaves_the_others_their_say(settings: Settings) -> None:
    asked = Counter[str]()

    def solve(_: str, __: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        asked["n"] += 1
        return [chat_reply("<answer>AMPK</answer>"), (500, {}), chat_reply("<answer>mTOR</answer>")][asked["n"] - 1]

    with serving(solve) as ADDRESSES["solver"]:
        verdict = score(TURN)
    assert (verdict["valid"], verdict["attempts_valid"], verdict["attempts_correct"]) == (1, 2, 1)
    assert verdict["difficulty"] == 1


def solving(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same settings for a worker of the solver's own training, with no service to be reached."""
    ADDRESSES.update(solver="http://127.0.0.1:9", search="http://127.0.0.1:9")
    monkeypatch.setattr(reward, "load_settings", lambda: changed(made_at(settings), {"trainer.role": "solver"}))


GOLD = {"question": "Which enzyme does metformin act on?", "answer": "AMPK", "hop": 2}


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("<answer>AMPK</answer>", 1),
        ("<answer>the ampk.</answer>", 1),
        ("<answer>AMPK</answer><answer>mTOR</answer>", 0),
        ("AMPK", 0),
    ],
)
def test_a_rollout_of_the_solver_is_scored_by_exact_match_and_asks_nobody(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, said: str, right: float
) -> None:
    solving(settings, monkeypatch)
    numbers = score(f"<think>x</think>{said}", hop=2, more=GOLD)
    assert (numbers["score"], numbers["exact_match"], numbers["valid"]) == (right, right, 1)
    solver = settings_of_round(settings)
    [verdict] = written(solver)
    assert {name: verdict[name] for name in numbers} == numbers
    assert (verdict["question"], verdict["gold"], verdict["attempts"]) == (GOLD["question"], "AMPK", [])
    assert verdict["answer"] == ("" if said == "AMPK" else said.rpartition("<answer>")[2].removesuffix("</answer>"))


def settings_of_round(settings: Settings) -> Settings:
    """The settings by which the solver's log is found."""
    return changed(settings, {"trainer.role": "solver"})


@pytest.mark.parametrize("reason", ["search", "deadline"])
def test_a_lost_rollout_of_the_solver_is_invalid_and_not_wrong(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    solving(settings, monkeypatch)
    assert score("<answer>mTOR</answer>", hop=2, lost=reason, more=GOLD)["valid"] == 0
    [verdict] = written(settings_of_round(settings))
    assert (verdict["valid"], verdict["invalid_reason"]) == (0, reason)


def test_a_validation_of_the_solver_is_scored_at_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    solving(settings, monkeypatch)
    numbers = score("<answer>AMPK</answer>", hop=2, more=GOLD | {"split": "held_out"})
    assert numbers["score"] == 1
    assert [verdict["split"] for verdict in written(settings_of_round(settings))] == ["held_out"]


def test_searches_of_a_solver_are_counted_by_whether_they_brought_papers() -> None:
    searches = [{"queries": ["metformin"], "pmids": pmids, "text": ""} for pmids in (["7"], [])]
    turns = [CALL, CALL, "<tool_call>{</tool_call><answer>HER2</answer>"]
    info = INFO | GOLD | {"answer": "ERBB2"}
    numbers, verdict = reward.score_answer({"turns": turns, "searches": searches, "step": 3}, info)
    assert (numbers["searches_made"], numbers["calls_failed"]) == (1, 2)
    assert (numbers["score"], numbers["biomedical_match"]) == (0, 1)
    assert (verdict["step"], verdict["calls_broken"]) == (3, {"not_json": 1})


def test_a_question_without_a_gold_answer_is_an_error_and_not_a_score(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    solving(settings, monkeypatch)
    with pytest.raises(ValueError, match="at least one gold answer"):
        score("<answer>AMPK</answer>", hop=2, more=GOLD | {"answer": ""})


def test_the_batch_entry_gives_the_same_scores_as_the_streaming_one(settings: Settings) -> None:
    texts = [TURN, "no tags", TURN.replace("AMPK", "mTOR")]
    with serving(lambda _, __: chat_reply("<answer>AMPK</answer>")) as ADDRESSES["solver"]:
        streamed = [score(text) for text in texts]
        batch = reward.compute_biomedical_challenger_score_batch(
            ["search_biomedical_1"] * 3,
            texts,
            [None] * 3,
            [INFO] * 3,
            model_name="solver",
            base_url=f"{ADDRESSES['solver']}/v1",
            reward_rollout_n=3,
        )
    assert batch == streamed
    assert [verdict["attempts_made"] for verdict in batch] == [3, 0, 3]


def test_the_batch_entry_asks_the_named_model_as_often_as_told(settings: Settings) -> None:
    models = Counter[str]()

    def solve(_: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        models[body["model"]] += 1
        return chat_reply("<answer>AMPK</answer>")

    with serving(solve) as address:
        reward.compute_biomedical_challenger_score_batch(
            ["search_biomedical_1"], [TURN], [None], [INFO], model_name="qwen", base_url=address, reward_rollout_n=4
        )
    assert models == {"qwen": 4}


def test_of_two_solver_addresses_a_dead_one_costs_the_batch_entry_no_attempt(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with serving(lambda _, __: chat_reply("<answer>AMPK</answer>")) as address:
        [verdict] = reward.compute_biomedical_challenger_score_batch(
            ["search_biomedical_1"], [TURN], [None], [INFO],
            model_name="solver", base_url=f"{dead}/v1, {address}/v1/", reward_rollout_n=8,
        )  # fmt: skip
    assert (verdict["attempts_valid"], verdict["attempts_correct"]) == (8, 8)


def test_the_batch_entry_reads_turns_and_results_of_a_decoded_response(settings: Settings) -> None:
    result = "user\n<tool_response>\nPMID 7: AMPK paper.\n</tool_response>\nassistant\n"
    found = reward.read_response(f"<think>a</think>{CALL}\n{result}{TURN}")
    assert found["searches"] == [{"queries": ["metformin"], "pmids": ["7"], "text": "PMID 7: AMPK paper."}]
    proposal = reward.read_proposal(found, hop=2, info=INFO)
    assert (proposal.searches, proposal.failed_calls, proposal.seen) == (1, 0, ("1", "7"))


def test_the_same_search_again_is_no_further_search() -> None:
    def found(*queries: str) -> int:
        searches = [{"queries": [query], "pmids": ["7"], "text": "PMID 7: x"} for query in queries]
        return reward.read_proposal({"turns": [CALL] * len(queries), "searches": searches}, hop=3, info=INFO).searches

    assert [found("metformin"), found("metformin", "Metformin."), found("metformin", "AMPK")] == [1, 1, 2]


@pytest.mark.parametrize(
    ("question", "copied"),
    [
        ("Which kinase does metformin activate in the liver?", True),
        (
            "Which kinase does metformine activate in the body?",
            True,
        ),  # from the run that found it
        ("On which receptor does trastuzumab act?", True),  # an example that only the solver sees
        ("Which kinase does metformin inhibit in neurons of the hypothalamus?", False),
        ("Which kinase does metformin activate?</question><answer>AMPK</answer></think></question>", True),
        ("Which gene does imatinib resistance depend on?", False),
        ("", False),
    ],
)
def test_a_worked_examples_question_is_recognised_however_it_is_spelt(question: str, copied: bool) -> None:
    turn = f"<think>x</think><question>{question}</question><answer>AMPK</answer>"
    assert reward.read_proposal({"turns": [turn], "searches": []}, hop=1, info=INFO).copied == copied


def test_attempt_seeds_are_the_same_for_the_same_question_and_differ_otherwise() -> None:
    assert reward.attempt_seeds(1, 2, "q", 3) == reward.attempt_seeds(1, 2, "q", 3)
    assert reward.attempt_seeds(1, 2, "q", 3) != reward.attempt_seeds(1, 3, "q", 3)
    assert len(set(reward.attempt_seeds(1, 2, "q", 5))) == 5


@pytest.mark.parametrize("source", ["gsm8k", "search_biomedical_", "search_biomedical_x", "search_zero_2"])
def test_an_unknown_data_source_is_an_error(source: str) -> None:
    assert hop_of("search_biomedical_3") == 3
    with pytest.raises(ValueError, match="search_biomedical_<hop>"):
        hop_of(source)
