"""What a killed training leaves behind, and what a resume makes of it."""

import json
import os
from pathlib import Path

from services.trainer.checkpoints import discard_incomplete, newest_checkpoint, prune
from services.trainer.evaluate import interval
from services.trainer.paths import run_paths
from services.trainer.records import (
    HELD_OUT,
    TRAIN,
    compact,
    mean_parts,
    read_metrics,
    read_verdicts,
    seconds_trained,
)
from services.trainer.train import signs_of_progress
from shared.settings import build_settings


def write_checkpoint(folder: Path, step: int, *, complete: bool = True) -> None:
    actor = folder / f"global_step_{step}" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "model_world_size_1_rank_0.pt").write_bytes(b"x")
    (actor / "huggingface" / "model.safetensors").write_bytes(b"x")
    if complete:
        (actor.parent / "data.pt").write_bytes(b"x")


def verdict(split: str, step: int, index: int, score: float = 0.5) -> dict[str, object]:
    return {"split": split, "step": step, "index": index, "time": step + index / 100, "score": score, "hop": 1}


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


def test_a_line_cut_off_by_a_kill_is_skipped(tmp_path: Path) -> None:
    write_verdicts(tmp_path / "log", [verdict(TRAIN, 1, 0)], tail='{"split": "tra')
    assert [len(rows) for rows in read_verdicts(tmp_path / "log", TRAIN).values()] == [1]


def test_a_resume_keeps_finished_steps_and_whole_validations_only(tmp_path: Path) -> None:
    log = tmp_path / "log"
    rows = [verdict(TRAIN, step, i) for step in (1, 2, 3) for i in (0, 1)]
    rows += [verdict(HELD_OUT, 0, 0), verdict(HELD_OUT, 0, 1), verdict(HELD_OUT, 2, 0)]
    write_verdicts(log, rows)
    compact(log, through=2, held_out=2)
    assert sorted(read_verdicts(log, TRAIN)) == [1, 2]
    assert sorted(read_verdicts(log, HELD_OUT)) == [0]
    compact(log, through=2, held_out=2)
    assert sorted(read_verdicts(log, TRAIN)) == [1, 2]


def test_metrics_of_a_repeated_step_are_the_newest(tmp_path: Path) -> None:
    for attempt, loss in ((1, 5.0), (2, 7.0)):
        line = json.dumps({"step": 1, "data": {"loss": loss}})
        (tmp_path / f"metrics-{attempt}.jsonl").write_text(line + "\n")
    assert read_metrics(tmp_path) == {1: {"loss": 7.0}}


def test_means_are_of_the_numbers_by_name() -> None:
    assert mean_parts([verdict(TRAIN, 1, 0, 0.25), verdict(TRAIN, 1, 1, 0.75)]) == {"score": 0.5}


def test_an_interval_of_one_value_has_no_width() -> None:
    assert interval([0.5]) == {"mean": 0.5, "half_width_95": 0.0, "count": 1.0}
    assert interval([0.0, 1.0])["half_width_95"] > 0.9


def test_the_time_of_a_training_is_the_sum_of_its_attempts(tmp_path: Path) -> None:
    for started, ended in ((100, 130), (200, 215)):
        path = tmp_path / f"metrics-{started * 10**9}.jsonl"
        path.touch()
        os.utime(path, (ended, ended))
    assert seconds_trained(tmp_path) == 45


def test_a_trainer_that_only_writes_that_it_waits_shows_no_progress(tmp_path: Path) -> None:
    paths = run_paths(build_settings({"DRZERO_STORAGE__SCRATCH_DIR": str(tmp_path)}))
    paths.log.mkdir(parents=True)
    before = signs_of_progress(paths)
    (paths.log / "verl.log").write_text("pending: 0, running: 1")
    assert signs_of_progress(paths) == before
    write_verdicts(paths.log, [verdict(TRAIN, 1, 0)])
    assert signs_of_progress(paths) != before
