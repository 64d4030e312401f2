"""What a killed training leaves behind, and what a resume makes of it."""

import json
import math
import os
import shutil
import time
import zipfile
from pathlib import Path

import round_world

from services.trainer.checkpoints import discard_incomplete, go_back, keep_copy, newest_checkpoint, prune
from services.trainer.evaluate import interval
from services.trainer.paths import run_paths
from services.trainer.records import (
    HELD_OUT,
    KEPT,
    TRAIN,
    append_refusal,
    compact,
    mean_parts,
    read_metrics,
    read_verdicts,
    seconds_trained,
)
from services.trainer.train import cluster_variables, training_origin, validated
from shared.settings import build_settings, changed


def write_checkpoint(folder: Path, step: int, *, complete: bool = True) -> None:
    actor = folder / f"global_step_{step}" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "model_world_size_1_rank_0.pt").write_bytes(b"x")
    (actor / "huggingface" / "model.safetensors").write_bytes(b"x")
    if complete:
        zipfile.ZipFile(actor.parent / "data.pt", "w").close()


def verdict(split: str, step: int, index: int, score: float = 0.5) -> dict[str, object]:
    row = {"split": split, "step": step, "index": index, "time": step + index / 100, "score": score, "hop": 1}
    return row | {"valid": 1.0}


def write_verdicts(log: Path, rows: list[dict[str, object]], tail: str = "") -> None:
    log.mkdir(exist_ok=True)
    (log / "verdicts-77.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)


def test_a_checkpoint_without_its_last_file_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, 2)
    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 11, complete=False)
    assert newest_checkpoint(tmp_path) == (10, tmp_path / "global_step_10")
    discard_incomplete(tmp_path)
    assert not (tmp_path / "global_step_11").exists()
    prune(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["global_step_10"]


def test_a_checkpoint_whose_last_file_was_cut_off_is_none(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    last = tmp_path / "global_step_1" / "data.pt"
    with zipfile.ZipFile(last, "w") as archive:
        archive.writestr("state", "the position in the data")
    whole = last.read_bytes()
    for size in range(len(whole)):
        last.write_bytes(whole[:size])
        assert newest_checkpoint(tmp_path) is None
    last.write_bytes(whole)
    assert newest_checkpoint(tmp_path) is not None


def test_the_last_good_checkpoint_outlives_the_rotation_and_becomes_the_newest_again(tmp_path: Path) -> None:
    checkpoints, kept = tmp_path / "checkpoints", tmp_path / "good"
    for step in (1, 2, 3):
        write_checkpoint(checkpoints, step)
    keep_copy(checkpoints, kept, through=2)
    keep_copy(checkpoints, kept, through=2)
    prune(checkpoints, 1)
    assert go_back(checkpoints, kept, through=2) == (2, checkpoints / "global_step_2")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_without_a_checkpoint_from_before_the_alarm_there_is_none_to_go_back_to(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoints", 3)
    keep_copy(tmp_path / "checkpoints", tmp_path / "good", through=2)
    assert go_back(tmp_path / "checkpoints", tmp_path / "good", through=2) is None


def test_rollouts_of_a_refused_try_do_not_count(tmp_path: Path) -> None:
    log = tmp_path / "log"
    write_verdicts(log, [verdict(TRAIN, 1, 0) | {"time": 1.0}])
    append_refusal(log, step=1, text="half of it lost")
    now = time.time()
    again = verdict(TRAIN, 1, 0) | {"began": now + 8, "time": now + 9}
    # Judged for the refused try, and written after the refusal.
    late = verdict(TRAIN, 1, 0) | {"began": 1.0, "time": now + 9}
    later = [again, late, verdict(TRAIN, 2, 0), verdict(HELD_OUT, 1, 0)]
    (log / "verdicts-78.jsonl").write_text("".join(json.dumps(row) + "\n" for row in later))
    assert read_verdicts(log, TRAIN)[1] == [again]
    assert {step: len(rows) for step, rows in read_verdicts(log, TRAIN).items()} == {1: 1, 2: 1}
    assert len(read_verdicts(log, HELD_OUT)[1]) == 1


def test_a_validation_stands_when_few_of_its_rows_were_lost() -> None:
    trainer = build_settings({"DRZERO_TRAINER__EVAL_SEEDS": "4"}).trainer
    rows = [verdict(HELD_OUT, 0, i) for i in range(4)]
    lost = [row | {"valid": 0.0} for row in rows]
    assert validated(rows, trainer)
    assert validated([*rows[:3], lost[3]], trainer)
    assert not validated([*rows[:2], *lost[2:]], trainer)
    assert not validated(rows[:3], trainer)


def test_a_line_cut_off_by_a_kill_is_skipped(tmp_path: Path) -> None:
    write_verdicts(tmp_path / "log", [verdict(TRAIN, 1, 0)], tail='{"split": "tra')
    assert [len(rows) for rows in read_verdicts(tmp_path / "log", TRAIN).values()] == [1]


def test_a_resume_keeps_finished_steps_and_whole_validations_only(tmp_path: Path) -> None:
    log = tmp_path / "log"
    rows = [verdict(TRAIN, step, i) for step in (1, 2, 3) for i in (0, 1)]
    rows += [verdict(HELD_OUT, 0, 0), verdict(HELD_OUT, 0, 1), verdict(HELD_OUT, 2, 0)]
    write_verdicts(log, rows)
    for _ in range(2):
        compact(log, through=2, validation_stands=lambda found: len(found) == 2)
        assert sorted(read_verdicts(log, TRAIN)) == [1, 2]
        assert sorted(read_verdicts(log, HELD_OUT)) == [0]


def test_a_resume_that_is_killed_itself_loses_no_verdict_and_has_none_twice(tmp_path: Path) -> None:
    first, log = tmp_path / "first", tmp_path / "log"
    write_verdicts(first, [verdict(TRAIN, step, i) for step in (1, 2, 3) for i in (0, 1)])
    (first / "verdicts-5.jsonl").write_text(json.dumps(verdict(TRAIN, 2, 2)) + "\n")
    done = shutil.copytree(first, tmp_path / "done")
    compact(done, through=2, validation_stands=bool)
    wanted = read_verdicts(done, TRAIN)
    assert [len(rows) for rows in wanted.values()] == [2, 3]
    # Killed when what is kept was written, and then after each file that it replaces was removed.
    for removed in ((), ("verdicts-5.jsonl",), ("verdicts-5.jsonl", "verdicts-77.jsonl")):
        shutil.copytree(first, log)
        shutil.copy(done / "verdicts-0.jsonl", log / KEPT)
        for name in removed:
            (log / name).unlink()
        compact(log, through=2, validation_stands=bool)
        assert read_verdicts(log, TRAIN) == wanted
        shutil.rmtree(log)


def test_a_resume_forgets_the_metrics_of_steps_that_will_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "metrics-5.jsonl"
    path.write_text("".join(json.dumps({"step": step, "data": {"loss": None}}) + "\n" for step in (1, 2, 3)))
    os.utime(path, (130, 130))
    compact(tmp_path, through=2, validation_stands=bool)
    assert sorted(read_metrics(tmp_path)) == [1, 2]
    assert path.stat().st_mtime == 130


def test_a_proposers_training_rests_on_the_solver_that_rewards_it_and_a_solvers_on_none(tmp_path: Path) -> None:
    settings = round_world.settings_at(tmp_path)
    own = {role: changed(settings, {"trainer.role": role}) for role in ("proposer", "solver")}
    round_world.publish_files(run_paths(settings).index, {"made": "index"})
    for one in own.values():
        round_world.publish_files(run_paths(one).seeds, {"made": one.trainer.role})
    proposer, solver = (training_origin(one, run_paths(one)) for one in own.values())
    assert solver.keys() == proposer.keys() - {"solver_weights"}
    assert solver["seeds"] != proposer["seeds"]


def test_what_a_cluster_is_told_is_the_settings_of_the_role_without_the_address_of_redis(tmp_path: Path) -> None:
    given = build_settings({"DRZERO_REDIS__URL": "redis://:secret@host", "DRZERO_TRAINER__SEED_MESH": "Sepsis"})
    settings = changed(given, {"trainer.role": "solver", "trainer.round": 2, "storage.data_dir": tmp_path / "data"})
    told = cluster_variables(settings)
    assert "secret" not in str(told)
    assert "" not in told.values()
    places = {"storage.scratch_dir": settings.storage.scratch_dir.absolute()}
    assert build_settings(told) == changed(settings, {**places, "redis.url": None})


def test_metrics_of_a_repeated_step_are_the_newest(tmp_path: Path) -> None:
    for attempt, loss in ((1, 5.0), (2, 7.0)):
        line = json.dumps({"step": 1, "data": {"loss": loss}})
        (tmp_path / f"metrics-{attempt}.jsonl").write_text(line + "\n")
    assert read_metrics(tmp_path) == {1: {"loss": 7.0}}


def test_a_number_that_is_not_finite_is_read_as_such(tmp_path: Path) -> None:
    (tmp_path / "metrics-1.jsonl").write_text('{"step": 1, "data": {"loss": null}}\n')
    assert math.isnan(read_metrics(tmp_path)[1]["loss"])


def test_means_are_of_the_numbers_by_name() -> None:
    lost = verdict(TRAIN, 1, 2, 0.0) | {"valid": 0.0}
    moments = {"time": 1.0, "generated": 1.0}
    means = mean_parts([verdict(TRAIN, 1, 0, 0.25) | moments, verdict(TRAIN, 1, 1, 0.75), lost])
    assert means == {"score": 0.5, "valid": 1.0}


def test_an_interval_of_one_value_has_no_width() -> None:
    assert interval([0.5]) == {"mean": 0.5, "half_width_95": 0.0, "count": 1.0}
    assert interval([0.0, 1.0])["half_width_95"] > 0.9


def test_the_time_of_a_training_is_the_sum_of_its_attempts(tmp_path: Path) -> None:
    for started, ended in ((100, 130), (200, 215)):
        path = tmp_path / f"metrics-{started * 10**9}.jsonl"
        path.touch()
        os.utime(path, (ended, ended))
    assert seconds_trained(tmp_path) == 45
