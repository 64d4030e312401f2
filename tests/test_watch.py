"""Watching a run of verl: finished steps, alarms, waits, outages and stalls, from the files a run writes."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
from round_world import json_lines, solver_verdict
from structlog.testing import capture_logs

from services.trainer import status
from services.trainer.guards import Alarm
from services.trainer.paths import RunPaths, run_paths
from services.trainer.records import Verdict
from services.trainer.train import give_up
from services.trainer.watch import Watch
from shared.files import publish
from shared.metrics import REGISTRY
from shared.settings import Settings, build_settings, changed

LOG: structlog.stdlib.BoundLogger = structlog.get_logger()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = build_settings(
        {
            "DRZERO_STORAGE__DATA_DIR": str(tmp_path / "data"),
            "DRZERO_STORAGE__SCRATCH_DIR": str(tmp_path / "scratch"),
            "DRZERO_TRAINER__GUARDS__STEPS": "2",
            "DRZERO_TRAINER__STALL_S": "0.05",
            "DRZERO_TRAINER__REWARD__GATE_AT": "0.5",
        }
    )
    run_paths(made).log.mkdir(parents=True)
    return made


def finish_step(paths: RunPaths, step: int, verdicts: Sequence[Verdict] = (), /, **numbers: Any) -> None:
    """Write what verl and a reward worker write for a step: these verdicts, or one of a proposer's rollout."""
    verdict = {
        "time": float(step), "split": "train", "step": step, "index": 0, "pmid": "1", "hop": 1, "question": "Q?",
        "answer": "A", "turns": ["x"], "searches": [], "attempts": [], "valid": 1.0, "invalid_reason": "",
        "reasoning_type": "entity", "calls_broken": {}, "seconds_attempts": 0.0, "score": 0.3, "format": 0.6,
        "difficulty": 0.0, "bonus": 0.0, "citations": 0.0, "genes": 1.0, "reasoning": 0.0, "novelty": 1.0,
        "attempts_made": 0.0, "attempts_valid": 0.0, "attempts_correct": 0.0, "attempts_credit": 0.0,
        "searches_made": 0.0, "calls_failed": 0.0, "trained_tokens": 5,
    }  # fmt: skip
    with (paths.log / "verdicts-1.jsonl").open("a") as stream:
        stream.write(json_lines(verdicts or [verdict]))
    data = {"timing_s/step": 2.0, "actor/entropy": 1.0, "actor/grad_norm": 0.1, **numbers}
    with (paths.log / "metrics-1.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": step, "data": data}) + "\n")


def write_checkpoint(paths: RunPaths, step: int) -> None:
    actor = paths.checkpoints / f"global_step_{step}" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "model_world_size_1_rank_0.pt").write_bytes(b"x")
    (actor / "huggingface" / "model.safetensors").write_bytes(bytes([step]))
    zipfile.ZipFile(actor.parent / "data.pt", "w").close()


def test_each_finished_step_is_reported_once(settings: Settings) -> None:
    paths = run_paths(settings)
    watch = Watch(settings, paths, LOG)
    with capture_logs() as lines:
        finish_step(paths, 1)
        assert watch.look() is None
        assert watch.look() is None
    assert sum("Proposer" in line["event"] or line["event"].startswith("Step 1") for line in lines) == 1


def test_a_step_of_the_solvers_training_is_reported_with_its_score_and_raises_no_alarm(settings: Settings) -> None:
    own = changed(settings, {"trainer.role": "solver"})
    paths = run_paths(own)
    paths.log.mkdir(parents=True)
    watch = Watch(own, paths, LOG)
    with capture_logs() as lines:
        for step in (1, 2, 3):
            finish_step(paths, step, [solver_verdict(step, answer) for answer in ("zinc", "lead")])
            assert watch.look() is None
    assert [line["event"] for line in lines].count("Rewards: Avg 0.500, Max 1.000") == 3
    assert status.health()["alarms"] == []


def test_steps_of_an_earlier_attempt_are_known_and_not_reported_again(settings: Settings) -> None:
    paths = run_paths(settings)
    finish_step(paths, 1)
    with capture_logs() as lines:
        Watch(settings, paths, LOG).look()
    assert lines == []


def test_the_switch_to_the_gate_is_written_for_the_reward_workers(settings: Settings) -> None:
    paths = run_paths(settings)
    watch = Watch(settings, paths, LOG)
    finish_step(paths, 1)
    watch.look()
    assert json.loads(paths.gate.read_text())["from_step"] == 3


def test_a_collapse_warns_first_then_stops_with_the_last_good_checkpoint_kept(settings: Settings) -> None:
    paths = run_paths(settings)
    watch = Watch(settings, paths, LOG)
    for step, entropy in ((1, 1.0), (2, 0.0)):
        write_checkpoint(paths, step)
        finish_step(paths, step, **{"actor/entropy": entropy})
        assert watch.look() is None
    assert status.health()["status"] == "warning"
    write_checkpoint(paths, 3)
    finish_step(paths, 3, **{"actor/entropy": 0.0})
    problem = watch.look()
    assert problem is not None
    assert problem.good_step == 1
    with publish(paths.seeds, settings={}, made_from={}) as draft:
        draft.rows = 0
    text = give_up(problem.text, problem.good_step, settings, paths)
    assert "step 1" in text
    assert "entropy" in text
    assert str(paths.last_good.resolve()) in text
    assert (paths.last_good / "model.safetensors").read_bytes() == b"\x01"
    assert [path.name for path in paths.checkpoints.iterdir()] == ["global_step_1"]


def test_a_wait_is_shown_and_is_no_stall(settings: Settings) -> None:
    paths = run_paths(settings)
    watch = Watch(settings, paths, LOG)
    paths.waiting.write_text(json.dumps({"text": "step 2 refused"}))
    for _ in range(3):
        assert watch.look() is None
    assert status.health()["waiting"] == "step 2 refused"
    paths.waiting.unlink()
    watch.look()
    assert status.health()["waiting"] is None


def test_an_outage_ends_the_run(settings: Settings) -> None:
    paths = run_paths(settings)
    paths.outage.write_text(json.dumps({"service": "solver", "text": "solver: away", "time": 0}))
    problem = Watch(settings, paths, LOG).look()
    assert problem is not None
    assert problem.good_step is None


def test_a_trainer_that_only_writes_that_it_waits_is_a_stall(settings: Settings) -> None:
    paths = run_paths(settings)
    watch = Watch(settings, paths, LOG)
    problem = None
    while problem is None:  # ends when stall_s has passed
        (paths.log / "verl.log").write_text("pending: 0, running: 1")
        problem = watch.look()
    assert "no sign of progress" in problem.text


def test_a_watch_that_begins_anew_shows_the_newest_step_its_plan_and_its_checkpoint(settings: Settings) -> None:
    paths = run_paths(settings)
    Watch(settings, paths, LOG)
    assert shown("step") == shown("checkpoint_timestamp_seconds") == 0
    for step in (1, 2):
        finish_step(paths, step, **{"actor/grad_norm": step / 10})
    write_checkpoint(paths, 2)
    before = shown("steps_total")
    status.show_alarms([Alarm("reward", step=9, streak=1, fatal=False, text="of a training before")])
    Watch(settings, paths, LOG)
    assert REGISTRY.get_sample_value("drzero_trainer_alarm_steps", {"alarm": "reward"}) == 0
    assert shown("step") == 2
    assert REGISTRY.get_sample_value("drzero_trainer_verl", {"name": "actor/grad_norm"}) == 0.2
    assert REGISTRY.get_sample_value("drzero_trainer_reward_mean", {"part": "score"}) == 0.3
    assert (shown("planned_steps"), shown("save_every_steps")) == (settings.trainer.steps, settings.trainer.save_every)
    assert shown("checkpoint_timestamp_seconds") == (paths.checkpoints / "global_step_2").stat().st_mtime
    assert shown("steps_total") == before


def shown(name: str) -> float | None:
    return REGISTRY.get_sample_value(f"drzero_trainer_{name}")
