"""Rewards that come after their rollouts: none is missed, none is another's, and what goes wrong is said."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from model_services import chat_reply, serving
from tiny_model import tiny_tokenizer

from services.trainer import late_rewards, reward
from services.trainer.late_rewards import LateRewards, Rollout
from services.trainer.paths import run_paths
from services.trainer.records import DEFECTS, append_defect, compact
from shared.settings import Settings, build_settings, changed

TURN = "<think>x</think><question>Which enzyme does metformin act on?</question><answer>AMPK</answer>"
INFO = {"document": "Metformin activates AMPK.", "split": "train", "index": 0, "pmid": "1"}
NOBODY = "http://127.0.0.1:9"


def settings_at(tmp_path: Path, solver: str = NOBODY) -> Settings:
    """A run in `tmp_path` with a solver at an address."""
    if not (tmp_path / "model").exists():
        tiny_tokenizer().save_pretrained(tmp_path / "model")
    made = build_settings(
        {
            "DRZERO_STORAGE__DATA_DIR": str(tmp_path / "data"),
            "DRZERO_STORAGE__SCRATCH_DIR": str(tmp_path / "scratch"),
            "DRZERO_SOLVER__MODEL": str(tmp_path / "model"),
            "DRZERO_SOLVER__URL": solver,
            "DRZERO_TRAINER__REWARD__ATTEMPT_DEADLINE_S": "2",
            "DRZERO_TRAINER__REWARD__QUESTION_DEADLINE_S": "2",
        }
    )
    run_paths(made).log.mkdir(parents=True, exist_ok=True)
    return made


def rollout(name: str) -> Rollout:
    """A rollout with a well-formed question."""
    return Rollout("search_biomedical_1", {"rollout": name, "step": 1, "turns": [TURN], "searches": []}, INFO)


def compute(settings: Settings, patch: pytest.MonkeyPatch, name: str, split: str) -> tuple[dict[str, Any], int]:
    """What verl gets for a rollout, and how many are still being judged then; returns when none is."""
    patch.setattr(reward, "load_settings", lambda: settings)
    info = INFO | {"split": split, "trajectory": json.dumps(rollout(name).trajectory)}

    async def one() -> tuple[dict[str, Any], int]:
        judging = reward.judging_of_this_loop()
        try:
            numbers = await reward.compute_score("search_biomedical_1", TURN, "", info)
            left = len(judging.late)
            await asyncio.gather(*judging.late, return_exceptions=True)
            return numbers, left
        finally:
            await judging.close()

    return asyncio.run(one())


def test_in_training_verl_is_not_kept_waiting_and_the_verdict_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(lambda _, __: chat_reply("<answer>AMPK</answer>")) as solver:
        settings = settings_at(tmp_path, solver)
        at_once, left = compute(settings, monkeypatch, "a", "train")
        waited, none_left = compute(settings, monkeypatch, "b", "held_out")
    assert (at_once, left, none_left) == (reward.PENDING, 1, 0)
    [verdict] = LateRewards(settings).wait({"a": rollout("a")}).values()
    assert {name: verdict[name] for name in waited} == waited
    assert verdict["attempts_made"] == settings.trainer.reward.attempts


def test_a_rollout_of_the_solvers_training_comes_late_too_and_needs_no_solver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = changed(settings_at(tmp_path), {"trainer.role": "solver"})
    run_paths(settings).log.mkdir(parents=True)
    monkeypatch.setitem(INFO, "question", "Which enzyme does metformin act on?")
    monkeypatch.setitem(INFO, "answer", "AMPK")
    monkeypatch.setitem(INFO, "hop", 1)
    assert compute(settings, monkeypatch, "a", "train") == (reward.PENDING, 1)
    found = LateRewards(settings).wait({"a": rollout("a")})["a"]
    assert (found["score"], found["valid"], found["gold"]) == (1, 1, "AMPK")
    assert LateRewards(settings).judge({"b": rollout("b")})["b"]["score"] == 1


def test_every_rollout_gets_its_own_verdict_when_it_is_written(tmp_path: Path) -> None:
    settings = settings_at(tmp_path)
    log = run_paths(settings).log
    names = [f"r{number}" for number in range(20)]

    def write() -> None:
        for number, name in enumerate([*names, "somebody-else's"]):
            row = {"split": "train", "rollout": name, "score": number}
            with (log / f"verdicts-{number % 3}.jsonl").open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        (log / "verdicts-9.jsonl").write_text('{"split": "train", "roll')

    (log / "verdicts-0.jsonl").write_text(json.dumps({"split": "held_out", "rollout": "r0", "score": -1}) + "\n")
    thread = threading.Timer(0.2, write)
    thread.start()
    found = LateRewards(settings).wait({name: rollout(name) for name in names})
    thread.join()
    assert {name: verdict["score"] for name, verdict in found.items()} == {n: i for i, n in enumerate(names)}


def test_rollouts_of_a_worker_that_died_are_judged_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_rewards, "GRACE_S", -1.9)
    with serving(lambda _, __: chat_reply("<answer>AMPK</answer>")) as solver:
        settings = settings_at(tmp_path, solver)
        row = {"split": "train", "step": 1, "rollout": "done", "question": "", "score": 7}
        (run_paths(settings).log / "verdicts-1.jsonl").write_text(json.dumps(row) + "\n")
        found = LateRewards(settings).wait({"done": rollout("done"), "left": rollout("left")})
    assert found["done"]["score"] == 7
    left = found["left"]
    assert (left["rollout"], left["valid"], left["attempts_correct"]) == ("left", 1, left["attempts_made"])


def test_judging_without_a_solver_makes_rollouts_invalid_and_not_wrong(tmp_path: Path) -> None:
    found = LateRewards(settings_at(tmp_path)).judge({"a": rollout("a"), "b": rollout("b")})
    judged = {name: (verdict["valid"], verdict["invalid_reason"]) for name, verdict in found.items()}
    assert judged == {"a": (0, "solver"), "b": (0, "solver")}


def test_an_error_of_the_rewards_own_code_ends_the_waiting_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_at(tmp_path)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect of judge.py")

    with monkeypatch.context() as patched:
        patched.setattr(reward, "judge", broken)
        assert compute(settings, patched, "a", "train")[0] == reward.PENDING
    with pytest.raises(RuntimeError, match=r"(?s)could not be judged.*broken.*a defect of judge\.py"):
        LateRewards(settings).wait({"a": rollout("a")})


def test_a_resume_forgets_an_earlier_defect(tmp_path: Path) -> None:
    log = run_paths(settings_at(tmp_path)).log
    append_defect(log, "long mended")
    compact(log, through=0, validation_stands=lambda rows: True)
    assert not (log / DEFECTS).exists()
