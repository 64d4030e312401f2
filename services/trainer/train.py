"""Stage `train`: seeds + services → a trained proposer, by verl's `main_ppo` in a child process.

This file starts verl with the overrides of `overrides.py`, follows what it writes, and decides: a crash is resumed
from the newest checkpoint up to `trainer.restarts` times; an outage that outlasted the patience, a stall, or a further
crash ends the stage with a sentence. Killed at any moment and started again, it goes on at the newest checkpoint.
The finished record is published as the artifact `training`; checkpoints stay in scratch.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from services.trainer import status
from services.trainer.checkpoints import discard_incomplete, newest_checkpoint, prune
from services.trainer.outage import read_outage
from services.trainer.overrides import verl_overrides
from services.trainer.paths import RunPaths
from services.trainer.protocol import AGENT, SEARCH_TOOL, prompt_hash
from services.trainer.records import (
    HELD_OUT,
    TRAIN,
    Verdict,
    compact,
    mean_parts,
    read_metrics,
    read_verdicts,
    seconds_trained,
)
from shared.command import UsageError
from shared.files import hash_json, publish, read_manifest, require_free_space, stale_reason, write_atomically
from shared.model_files import resolve_model, weights_identity
from shared.settings import Settings

ROOT = Path(__file__).parents[2]
POLL_S = 1.0
TERM_S = 20.0


def train(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> None:
    """Train unless a finished training of just these settings and inputs is there."""
    shape, origin = training_settings(settings), training_origin(settings, paths)
    reason = stale_reason(paths.training, settings=shape, made_from=origin)
    if reason is None:
        log.info("training reused", path=str(paths.training))
        return
    require_free_space(settings.storage.scratch_dir, settings.storage.min_free_gb)
    log.info("training", because=reason)
    begin_or_resume(paths, hash_json([shape, origin]), log)
    run_to_the_end(settings, paths, log)
    publish_record(settings, paths, shape, origin)
    prune(paths.checkpoints, 1)
    log.info("training finished", seconds=round(seconds_trained(paths.log)))


def training_settings(settings: Settings) -> dict[str, Any]:
    """The settings that shape what is trained; addresses, patience and numbers of workers do not."""
    trainer = settings.trainer
    neutral = {
        "run", "host", "port", "agent_workers", "reward_workers", "storage_units", "save_every", "keep_checkpoints",
        "patience_s", "stall_s", "object_store_gb", "restarts", "actor", "reward",
    }  # fmt: skip
    shape = trainer.model_dump(mode="json", exclude=neutral)
    shape["actor"] = trainer.actor.model_dump(mode="json", exclude={"rollout_threads", "gpu_memory_utilization"})
    shape["reward"] = trainer.reward.model_dump(mode="json", exclude={"concurrency"})
    shape["solver"] = {"model": settings.solver.model}
    return shape


def training_origin(settings: Settings, paths: RunPaths) -> dict[str, str]:
    """What the training is made from, by identity; raises ArtifactError when seeds or index are missing."""
    return {
        "seeds": read_manifest(paths.seeds).identity,
        "index": read_manifest(paths.index).identity,
        "base_weights": weights_identity(resolve_model(settings.trainer.actor.model, settings)),
        "solver_prompt": prompt_hash("solver"),
    }


def begin_or_resume(paths: RunPaths, key: str, log: structlog.stdlib.BoundLogger) -> None:
    """Keep the scratch files of an interrupted training of the same key; remove those of any other."""
    state = paths.work / "state.json"
    if state.is_file() and json.loads(state.read_text(encoding="utf-8"))["key"] == key:
        log.info("an interrupted training is resumed", folder=str(paths.work))
    else:
        shutil.rmtree(paths.work, ignore_errors=True)
        write_atomically(state, json.dumps({"key": key}))
    paths.log.mkdir(parents=True, exist_ok=True)
    paths.outage.unlink(missing_ok=True)


def run_to_the_end(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> None:
    """Run verl until all steps and the last validation are done; raises UsageError when that cannot be."""
    for attempt in range(settings.trainer.restarts + 1):
        if finished(settings, paths):
            return
        problem = run_verl(settings, paths, log)
        if problem is None and finished(settings, paths):
            return
        outage = read_outage(paths.outage)
        if outage is not None:
            raise UsageError(f"training stopped: {outage}. {how_to_resume(paths)}")
        problem = problem or "verl ended before all steps were done"
        log.warning("training crashed", problem=problem, attempt=attempt + 1, log=str(paths.log / "verl.log"))
    raise UsageError(f"training stopped: {problem}; see {paths.log / 'verl.log'}. {how_to_resume(paths)}")


def finished(settings: Settings, paths: RunPaths) -> bool:
    """Whether the last step has a checkpoint and the last validation all its rows."""
    newest = newest_checkpoint(paths.checkpoints)
    done = read_verdicts(paths.log, HELD_OUT).get(settings.trainer.steps, [])
    return newest is not None and newest[0] >= settings.trainer.steps and len(done) >= settings.trainer.eval_seeds


def how_to_resume(paths: RunPaths) -> str:
    """The last words of an interrupted training."""
    newest = newest_checkpoint(paths.checkpoints)
    place = f"the checkpoint of step {newest[0]}" if newest else "the start (no checkpoint yet)"
    return f"Run the same command again to resume from {place}"


def run_verl(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> str | None:
    """One attempt; returns None when verl ended well, else what happened."""
    discard_incomplete(paths.checkpoints)
    newest = newest_checkpoint(paths.checkpoints)
    compact(paths.log, through=newest[0] if newest else -1, held_out=settings.trainer.eval_seeds)
    write_verl_files(paths)
    model = resolve_model(settings.trainer.actor.model, settings)
    overrides = verl_overrides(settings, paths, model=model, resume_from=str(newest[1]) if newest else None)
    if newest and newest[0] >= settings.trainer.steps:
        overrides += ["trainer.val_only=true", "trainer.val_before_train=true"]
    log.info("verl starts", steps=settings.trainer.steps, resumed_at=newest[0] if newest else 0)
    with child(overrides, paths) as process:
        return follow(process, settings, paths, log)


def write_verl_files(paths: RunPaths) -> None:
    """The two files that verl reads beside its overrides. JSON is YAML."""
    tool = {"class_name": "services.trainer.search_tool.SearchTool", "config": {"type": "native"}}
    write_atomically(paths.tools_file, json.dumps({"tools": [tool | {"tool_schema": SEARCH_TOOL}]}))
    agent = {"name": AGENT, "_target_": "services.trainer.agent_loop.SearchAgentLoop"}
    write_atomically(paths.agents_file, json.dumps([agent]))


@contextmanager
def child(overrides: list[str], paths: RunPaths) -> Iterator[subprocess.Popen[bytes]]:
    """verl in a process group of its own; the group is ended when the block ends."""
    metrics = paths.log / f"metrics-{time.time_ns()}.jsonl"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VERL_USE_EXTERNAL_MODULES": "services.trainer.plugin",
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "HYDRA_FULL_ERROR": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        # One heap per thread lets glibc keep gigabytes that were freed long ago.
        "MALLOC_ARENA_MAX": "2",
        # Ray's memory monitor counts the page cache of a checkpoint as used memory and kills workers for it; the
        # kernel knows better.
        "RAY_memory_monitor_refresh_ms": "0",
    }
    command = [sys.executable, "-m", "services.trainer.verl_main", *overrides]
    with (paths.log / "verl.log").open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL, to verl and all it has started."""
    for number, patience in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, TERM_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def follow(
    process: subprocess.Popen[bytes], settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger
) -> str | None:
    """Watch one attempt: report finished steps, stop at an outage or a stall. Returns what went wrong, or None."""
    reported = set(read_metrics(paths.log))
    last_signs, last_change = signs_of_progress(paths), time.monotonic()
    while True:
        code = process.poll()
        metrics = read_metrics(paths.log)
        for step in sorted(set(metrics) - reported):
            reported.add(step)
            report_step(step, metrics[step], read_verdicts(paths.log, TRAIN).get(step, []), log)
        if code is not None:
            return None if code == 0 else f"verl ended with status {code}"
        if read_outage(paths.outage) is not None:
            return "a service stayed away"
        signs = signs_of_progress(paths)
        if signs != last_signs:
            last_signs, last_change = signs, time.monotonic()
        elif time.monotonic() - last_change > settings.trainer.stall_s:
            return f"no sign of progress for {settings.trainer.stall_s:.0f} s"
        time.sleep(POLL_S)


def signs_of_progress(paths: RunPaths) -> tuple[int, tuple[str, ...]]:
    """What grows while training goes on: verdicts, metrics and checkpoints.

    verl's own log does not count: a trainer that waits for a worker that has died goes on writing that it waits.
    """
    written = sum(path.stat().st_size for path in paths.log.glob("*.jsonl"))
    return written, tuple(sorted(str(path) for path in paths.checkpoints.glob("global_step_*/*")))


def report_step(
    step: int, metrics: dict[str, float], verdicts: list[Verdict], log: structlog.stdlib.BoundLogger
) -> None:
    """Log one step's averages with a sample, and show them as metrics."""
    means = mean_parts(verdicts)
    status.show_step(step, metrics, means)
    if not verdicts:
        return
    sample = max(verdicts, key=lambda v: v["score"])
    log.info(
        f"step {step}",
        reward_avg=round(means["score"], 3),
        reward_max=round(sample["score"], 3),
        format_avg=round(means["format"], 3),
        searches=int(sum(v["searches_made"] for v in verdicts)),
        seconds=round(metrics.get("timing_s/step", 0.0), 1),
        question=sample["question"][:120],
        answer=sample["answer"][:60],
        solver_answers=[attempt["answer"][:60] for attempt in sample["attempts"]],
    )


def publish_record(settings: Settings, paths: RunPaths, shape: dict[str, Any], origin: dict[str, str]) -> None:
    """Publish the rollouts, the held-out verdicts and the metrics of a finished training."""
    steps = settings.trainer.steps
    with publish(paths.training, settings=shape, made_from=origin) as draft:
        train_rows = [v for rows in read_verdicts(paths.log, TRAIN).values() for v in rows]
        held_rows = [v for rows in read_verdicts(paths.log, HELD_OUT).values() for v in rows]
        metrics = [{"step": step, **values} for step, values in read_metrics(paths.log).items() if step <= steps]
        for name, rows in (("rollouts", train_rows), ("held_out", held_rows), ("metrics", metrics)):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (draft.path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        draft.rows = len(train_rows)
        draft.seconds = seconds_trained(paths.log)
        draft.counts = {"steps": steps, "rollouts": len(train_rows), "held_out": len(held_rows)}
